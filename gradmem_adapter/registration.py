"""Registers "GRADMEM" as a PEFT method from outside PEFT. Only this file modifies PEFT's registries."""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from gradmem_adapter.config import REGISTRIES, GradMemConfig
from gradmem_adapter.meta_gradients import STRATEGIES
from gradmem_adapter.model import GradMemModel
from gradmem_adapter.write.optimizers import OPTIMIZERS

NAME = "GRADMEM"


def _extend_peft_type() -> None:
    """Add the member GRADMEM to PEFT's closed `PeftType` enum, unless it is already there.

    PEFT has no hook for methods from other packages, and a plain string instead of a member leaves
    `get_model_status` blank. The member behaves like PEFT's own in JSON, pickle and `list(PeftType)`.
    """
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    # EnumType.__setattr__ refuses members it did not make; a class attribute is what `PeftType.GRADMEM` reads.
    type.__setattr__(PeftType, NAME, member)


def register() -> None:
    """Register GradMem with PEFT; may be called any number of times."""
    REGISTRIES.update(write_optimizer=OPTIMIZERS, meta_gradient=STRATEGIES)
    _extend_peft_type()
    if PeftType(NAME) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=GradMemConfig, model_cls=GradMemModel, prefix=GradMemModel.prefix
        )
