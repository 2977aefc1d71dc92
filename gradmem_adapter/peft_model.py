"""What `get_peft_model` returns for a GradMem adapter, for type checkers and editors.

PEFT's own types do not have `write`: at run time, a `PeftModel` forwards unknown attributes to its tuner. At run time,
the names here are PEFT's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import PeftModelForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gradmem_adapter.config import GradMemConfig
    from gradmem_adapter.model import GradMemModel

    class GradMemPeftModel(GradMemModel, PeftModelForCausalLM):  # type: ignore[misc] # both have set_adapter, ...
        """A `PeftModel` with a GradMem adapter: PEFT's methods and those of `GradMemModel`."""

    def get_peft_model(
        model: PreTrainedModel,
        peft_config: GradMemConfig,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
        revision: str | None = None,
        low_cpu_mem_usage: bool = False,
    ) -> GradMemPeftModel:
        """PEFT's `get_peft_model`."""
        ...

else:
    from peft import get_peft_model

    GradMemPeftModel = PeftModelForCausalLM

__all__ = ["GradMemPeftModel", "get_peft_model"]
