"""GradMem in PEFT's life cycle: adding adapters to a backbone, switching, deleting and unloading them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.layer import MemorySlots
from gradmem_adapter.lora import inject_lora
from gradmem_adapter.utils.backbone import check_backbone, check_start, max_positions
from gradmem_adapter.utils.changes import Changes
from gradmem_adapter.utils.fingerprint import Fingerprinted, versions
from gradmem_adapter.utils.parameters import (
    adapter_parameters,
    backbone_parameters,
    first_of,
    trainable_as_before,
    wrong_names,
)
from gradmem_adapter.utils.weights import keep_gradients

Method = TypeVar("Method", bound=Callable[..., Any])
_SHOWN = 3
"""The most tensors that an error lists."""
SLOTS = "memory_slots"
"""The name of the layer in the backbone. It must not contain the tuner's prefix, because PEFT skips such modules."""


class AdapterChangedError(RuntimeError):
    """Another thread changed a model's adapters while it wrote or read, so the result belongs to no single adapter."""


def of_one_adapter(method: Method) -> Method:
    """Make a method of `GradMemTuner` raise `AdapterChangedError` if its result would belong to no single adapter."""

    @wraps(method)
    def checked(self: GradMemTuner, *args: Any, **kwargs: Any) -> Any:
        with self._unchanged():
            return method(self, *args, **kwargs)

    return cast(Method, checked)


def _warn_of_untrained_backbone(model: Any, adapter: str) -> None:
    """Warn if an adapter is loaded on the untrained version of a backbone that it was trained with."""
    config: GradMemConfig = model.peft_config[adapter]
    trained_here = any(other.train_backbone for name, other in model.peft_config.items() if name != adapter)
    if config.train_backbone and not trained_here and model.name_or_path == config.base_model_name_or_path:
        warnings.warn(
            f"The adapter {adapter!r} was trained together with its backbone, but {model.name_or_path!r} is that "
            "backbone before training, so they do not match. Open both with load_checkpoint(path). With PEFT, pass the "
            "trained backbone: AutoModelForCausalLM.from_pretrained(path + '/backbone') of a local directory.",
            stacklevel=6,
        )


class _Configs(dict[str, GradMemConfig]):
    """Configurations by adapter name, shared with the backbone. PEFT enters a new configuration here before it changes
    anything, so this is where adapters of other methods are refused."""

    def __setitem__(self, adapter: str, config: GradMemConfig) -> None:
        if not isinstance(config, GradMemConfig):
            raise ValueError(
                f"The backbone has a GradMem adapter, and the adapter {adapter!r} of a {type(config).__name__} would "
                "change the model that memory is written with. To train a LoRA with the memory, use "
                "GradMemConfig(lora_config=...). For other adapters, get the backbone alone with model.unload()."
            )
        super().__setitem__(adapter, config)

    def update(self, configs: Mapping[str, GradMemConfig]) -> None:  # type: ignore[override] # as PEFT calls it
        """Enter several configurations; `ValueError` if one belongs to another method."""
        for adapter, config in configs.items():
            self[adapter] = config


class _NoneLeft(_Configs):
    """The configurations after the last adapter was deleted. `PeftModel` still looks up the adapter that it considers
    active, but only to see that it is not prompt learning."""

    def __missing__(self, adapter: str) -> GradMemConfig:
        return GradMemConfig()


class GradMemTuner(BaseTuner):
    """A PEFT tuner that adds one layer, the memory slots, to a backbone, and a nested LoRA if configured."""

    peft_config: dict[str, GradMemConfig]  # type: ignore[assignment] # PEFT's own type, narrowed
    prefix = "gradmem_"
    uses_shared_state = True
    # LoRA layers belong to the adapter like the slots: PEFT switches, deletes and freezes both by this class.
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: GradMemConfig | dict[str, GradMemConfig],
        adapter_name: str,
        **options: Any,
    ) -> None:
        check_backbone(model)
        keep_gradients(cast(PreTrainedModel, model))
        self._changes = Changes()
        configs = {adapter_name: peft_config} if isinstance(peft_config, GradMemConfig) else peft_config
        super().__init__(model, cast(Any, _Configs(configs)), adapter_name, **options)
        self.register_load_state_dict_pre_hook(self._changes.begin_loading)
        self.register_load_state_dict_post_hook(self._changes.end_loading)

    @property
    def slots(self) -> MemorySlots:
        """The layer that holds every trained tensor of the method."""
        return getattr(self.model, SLOTS)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("GradMem adds a module and replaces none.")

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter's slots (and its LoRA) to the backbone. Called by PEFT."""
        config, first = self.peft_config[adapter_name], not hasattr(model, SLOTS)
        if config.start != "slots":
            check_start(cast(PreTrainedModel, model), config.start)
        with trainable_as_before(model):
            try:
                self._inject(model, adapter_name, config, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            except Exception:  # some layers may already have their LoRA
                if first:
                    self.unload()
                else:
                    self.delete_adapter(adapter_name)
                raise

    def _inject(
        self,
        model: nn.Module,
        adapter_name: str,
        config: GradMemConfig,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        with self._changes.one(), torch.inference_mode(False):  # WRITE could not use tensors made in inference mode
            # First PEFT's own part, which freezes the backbone; the layers added after it stay trainable.
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            inject_lora(model, adapter_name, config, low_cpu_mem_usage)
            if not hasattr(model, SLOTS):
                model.add_module(SLOTS, MemorySlots())
            empty = low_cpu_mem_usage or torch.get_default_device().type == "meta"
            getattr(model, SLOTS).add(adapter_name, config, model, empty=empty)
            inference_mode = all(self.peft_config[name].inference_mode for name in self.active_adapters)
            self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter; the backbone is trainable if its config has `train_backbone=True`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        with self._changes.one(unless=lambda: names == self.active_adapters):
            super().set_adapter(adapter_name, inference_mode=inference_mode)
        if any(config.train_backbone for config in self.peft_config.values()):
            train = any(self.peft_config[name].train_backbone for name in self.active_adapters)
            for _, parameter in backbone_parameters(self.model):
                parameter.requires_grad_(train and not inference_mode)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT calls this to map the names of loaded tensors to those of the model. They must be all tensors of the
        adapter, plus at most embeddings of the backbone. Without this check, PEFT would silently keep the initial
        values of missing LoRA tensors, ignore unknown tensors, change the backbone, and accept an untrained backbone
        for an adapter that was trained with it."""

        def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return super(GradMemTuner, cls)._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)

        def own(embeddings: bool) -> Set[str]:
            return named(
                get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=embeddings)
            ).keys()

        found = named(state_dict)
        if wrong := wrong_names(found.keys(), own(embeddings=False), own(embeddings=True)):
            raise ValueError(
                f"The tensors do not match the adapter {adapter_name!r}: {first_of(wrong, _SHOWN)}. Create the adapter "
                "with the configuration that they were saved with, or get the file again."
            )
        _warn_of_untrained_backbone(model, adapter_name)
        return found

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """With PEFT's `autocast_adapter_dtype=False`, the adapter has the backbone's dtype. Memory stays float32."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            dtype = cast(Tensor, self.model.get_input_embeddings().weight).dtype
            for parameter in self.slots.parameters_of(adapter_name):
                parameter.data = parameter.data.to(dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's slots and LoRA."""
        frozen = not any(parameter.requires_grad for _, parameter in adapter_parameters(self.model))
        with self._changes.one():
            super().delete_adapter(adapter_name)
            if not self.peft_config:
                self.peft_config = self.model.peft_config = _NoneLeft()
            # PEFT takes the new active adapter from the first layer that it finds, which may be a LoRA of only some
            # adapters.
            self.set_adapter(self.slots.active_adapters, inference_mode=frozen)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """PEFT's `disable_adapter()` calls this when it is entered and left."""
        with self._changes.one():
            super()._enable_adapter_layers(enabled)

    def _check_merge_allowed(self) -> None:
        """PEFT calls this before it merges anything."""
        raise NotImplementedError(
            "A GradMem adapter cannot be merged into the backbone: memory is written per context, by gradients through "
            "the adapter's tensors. Keep the adapter, or get the backbone alone with unload()."
        )

    def unmerge_adapter(self) -> None:
        """Raises `NotImplementedError`, because nothing can have been merged."""
        self._check_merge_allowed()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around `forward` and `generate`, and then drops the arguments that are its own."""
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(
                    f"{name} cannot be used with a GradMem adapter, because all rows of a batch use the same adapter. "
                    "Choose it with set_adapter(name), and run the rows of each adapter separately."
                )
        yield

    def unload(self) -> nn.Module:
        """Remove all adapters and return the backbone."""
        with self._changes.one():
            super().unload()
            if hasattr(self.model, SLOTS):
                delattr(self.model, SLOTS)
        return self.model

    def changing(self) -> AbstractContextManager[None]:
        """Change weights in the block: what other threads write or read meanwhile belongs to no adapter."""
        return self._changes.one()

    @contextmanager
    def _unchanged(self) -> Iterator[Callable[[], None]]:
        """Raise `AdapterChangedError` if another thread changes the adapters before the block ends.

        Yields:
            A function that raises it if that has happened so far; call it before keeping any result of the block.
        """
        weights = getattr(self.model, SLOTS, self.model)  # after unload() there are no slots
        before = self._changes.number, versions(weights)

        def check() -> None:
            begun, done = self._changes.number
            if begun != done or ((begun, done), versions(weights)) != before:
                raise AdapterChangedError(
                    "Another thread, or a callback of this one, switched, loaded, trained or deleted an adapter while "
                    "this one wrote or read with the model. The result belongs to no single adapter and is not "
                    "returned. Use one lock for both, or a separate model for each adapter."
                )

        check()
        try:
            yield check
        except Exception:
            check()  # a change may be the cause of the failure
            raise
        check()

    @property
    def prefix_length(self) -> int:
        """How many positions the memory takes, including its control vectors: m + 2c."""
        return self.peft_config[self._adapter].prefix_length

    @property
    def positions(self) -> int | None:
        """How many positions the backbone has; `None` if unknown or unlimited."""
        return max_positions(self.model)

    def fingerprint(self) -> str:
        """The identity of the backbone and the active adapter; states carry it, and READ compares it."""
        return self._fingerprinted().fingerprint

    def _fingerprinted(self) -> Fingerprinted:
        """The fingerprint with the snapshot that it belongs to. Each call looks at all weights, so call it only once
        per task."""
        return self.slots.fingerprints.get(self.model, self._adapter, self.peft_config[self._adapter])

    @property
    def _adapter(self) -> str:
        """The one active adapter."""
        if self.slots.disable_adapters:
            raise ValueError("The adapter is disabled: memory cannot be written or read inside disable_adapter().")
        active = self.active_adapters
        if len(active) != 1:
            raise ValueError(
                f"Memory needs exactly one active adapter, got {len(active)}: {active}. Choose one with "
                "set_adapter(name)."
            )
        return active[0]
