"""Every trained tensor of the method, in one PEFT tuner layer that is a child of the backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import GradMemConfig
from .utils.backbone import device_of
from .utils.fingerprint import FingerprintCache

Phase = Literal["write", "read"]

START_GAIN = 0.1
"""The initial gain of the forward pass that WRITE starts from. Starting at 0, an optimizer would need many steps to
reach a useful value. With 0.1, the output of the forward pass is about twice as large as slots from the vocabulary, in
SmolLM2-135M."""


class MemorySlots(nn.Module, BaseTunerLayer):
    """The memory slots M_0 and the method's optional parts, per adapter name.

    m is the number of memory tokens, c of control tokens, d the embedding size, V the vocabulary size.

    Attributes:
        gradmem_memory (`Parameter`): `[m, d]`, the memory slots M_0.
        gradmem_log_write_lr (`Parameter`): `[n]` or `[n, m, d]`, natural logarithm of the learned write learning rates
            of the first n write steps, one for all elements of the memory or one for each.
        gradmem_start_gain (`Parameter`): `[d]`, the gain of the forward pass that WRITE starts from.
        gradmem_pool_gain (`Parameter`): `[d]`, the gain of the means of the context's parts.
        gradmem_write_start, gradmem_write_end, gradmem_read_start, gradmem_read_end (`Parameter`): `[c, d]`, control
            vectors.
        gradmem_projection (`Linear`): `[d, d]`, applied to the memory before it enters the model.
        gradmem_write_head (`Linear`): `[V, hidden]`, the output head of WRITE.
    """

    adapter_layer_names = (
        "gradmem_memory",
        "gradmem_log_write_lr",
        "gradmem_start_gain",
        "gradmem_pool_gain",
        "gradmem_write_start",
        "gradmem_write_end",
        "gradmem_read_start",
        "gradmem_read_end",
        "gradmem_projection",
        "gradmem_write_head",
    )
    other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.gradmem_memory = nn.ParameterDict()
        self.gradmem_log_write_lr = nn.ParameterDict()
        self.gradmem_start_gain = nn.ParameterDict()
        self.gradmem_pool_gain = nn.ParameterDict()
        self.gradmem_write_start = nn.ParameterDict()
        self.gradmem_write_end = nn.ParameterDict()
        self.gradmem_read_start = nn.ParameterDict()
        self.gradmem_read_end = nn.ParameterDict()
        self.gradmem_projection = nn.ModuleDict()
        self.gradmem_write_head = nn.ModuleDict()
        self._devices: dict[str, torch.device] = {}
        self.fingerprints = FingerprintCache()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemorySlots:
        """Called by PyTorch for `.to()`, `.half()` and similar methods of any model that contains this layer."""
        self.fingerprints.release()
        return super()._apply(fn, recurse)

    def add(self, adapter: str, config: GradMemConfig, backbone: PreTrainedModel, *, empty: bool = False) -> None:
        """Create the tensors of one adapter, on the device of the backbone's embeddings, float32 or wider.

        Args:
            adapter (`str`): the adapter's name.
            config (`GradMemConfig`): which parts it has.
            backbone (`PreTrainedModel`): the model whose embeddings and output head are used.
            empty (`bool`, *optional*, defaults to `False`): create the tensors on the meta device, without values, for
                loading.
        """
        embedding = backbone.get_input_embeddings()
        table = cast(Tensor, embedding.weight)
        device = device_of(backbone)
        self._devices[adapter] = device
        if empty:
            device = torch.device("meta")
        factory: dict[str, Any] = {"device": device, "dtype": torch.promote_types(table.dtype, torch.float32)}
        m, c, d = config.num_memory_tokens, config.num_control_tokens, table.shape[1]

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, **factory) * config.memory_init_std)

        if config.memory_init == "vocab" and not empty:
            tokens = torch.randint(table.shape[0], (m,), device=device)
            with torch.no_grad():  # through the module, which may scale embeddings (Gemma)
                self.gradmem_memory[adapter] = nn.Parameter(embedding(tokens).to(**factory, copy=True))
        else:
            self.gradmem_memory[adapter] = normal(m, d)
        if config.learn_write_lr != "no":
            shape = (config.num_write_lrs, *([m, d] if config.learn_write_lr == "per_element" else []))
            self.gradmem_log_write_lr[adapter] = nn.Parameter(torch.full(shape, math.log(config.write_lr), **factory))
        if config.start != "slots":
            self.gradmem_start_gain[adapter] = nn.Parameter(torch.full((d,), START_GAIN, **factory))
        if config.start == "pooled_context":
            self.gradmem_pool_gain[adapter] = nn.Parameter(torch.ones(d, **factory))
        if c:
            for name in ("write_start", "write_end", "read_start", "read_end"):
                getattr(self, f"gradmem_{name}")[adapter] = normal(c, d)
        if config.memory_projection == "shared":
            projection = nn.Linear(d, d, **factory)
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)
            self.gradmem_projection[adapter] = projection
        if config.write_head:
            head = backbone.get_output_embeddings()
            weight, bias = cast(Tensor, head.weight), getattr(head, "bias", None)
            write_head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, **factory)
            if not write_head.weight.is_meta:
                with torch.no_grad(), align_module_device(head):
                    write_head.weight.copy_(cast(Tensor, head.weight))
                    if bias is not None:
                        write_head.bias.copy_(cast(Tensor, head.bias))
            self.gradmem_write_head[adapter] = write_head

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Called by PEFT after loading on the meta device. There is no base layer, so the device is that of the
        embeddings."""
        for parameter in self.parameters_of(adapter_name):
            parameter.data = parameter.data.to(device or self._devices[adapter_name])

    def parameters_of(self, adapter: str) -> Iterator[nn.Parameter]:
        """Every tensor of one adapter."""
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter in container:
                entry = container[adapter]
                yield from entry.parameters() if isinstance(entry, nn.Module) else [entry]

    def prefix(self, memory: Tensor, phase: Phase, adapter: str) -> Tensor:
        """The prefix before the tokens: `[start; projection(M); end]`.

        Args:
            memory (`Tensor`): `[B, m, d]`, M.
            phase (`str`): the phase of the control vectors, `"write"` or `"read"`.
            adapter (`str`): the adapter's name.

        Returns:
            `Tensor`: `[B, m + 2c, d]`.
        """
        if adapter in self.gradmem_projection:
            projection = cast(nn.Linear, self.gradmem_projection[adapter])
            memory = projection(memory.to(projection.weight.dtype))
        starts: nn.ParameterDict = getattr(self, f"gradmem_{phase}_start")
        if adapter not in starts:
            return memory
        ends: nn.ParameterDict = getattr(self, f"gradmem_{phase}_end")
        start = starts[adapter].expand(len(memory), -1, -1)
        end = ends[adapter].expand(len(memory), -1, -1)
        return torch.cat([start, memory, end], dim=1)

    def write_head(self, adapter: str) -> nn.Module | None:
        """The output head of WRITE; `None` if WRITE uses the backbone's."""
        return self.gradmem_write_head[adapter] if adapter in self.gradmem_write_head else None  # noqa: SIM401 - no get
