"""Memory slots: how an adapter's tensors are initialised."""

import pytest
import torch
from peft import get_peft_model
from tiny import ARCHITECTURES, tiny, tokens

from gradmem_adapter import GradMemConfig
from gradmem_adapter.layer import START_GAIN


def slots(backbone, **config):
    return get_peft_model(backbone, GradMemConfig(num_memory_tokens=5, **config)).base_model.slots


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slots_from_the_vocabulary_are_embeddings_of_the_model(architecture):
    backbone = tiny(architecture)
    known = backbone.get_input_embeddings()(torch.arange(61))
    memory = slots(backbone, memory_init="vocab").gradmem_memory["default"]
    assert all((known == row).all(dim=1).any() for row in memory)
    assert memory.requires_grad


def test_normal_slots_have_the_configured_deviation():
    memory = slots(tiny(), memory_init_std=0.5).gradmem_memory["default"]
    assert memory.std().item() == pytest.approx(0.5, rel=0.2)


def test_parts_start_neutral():
    backbone = tiny("gpt2")
    layer = slots(
        backbone, memory_projection="shared", write_head=True, start="pooled_context", learn_write_lr="per_element",
        num_write_lrs=2, write_lr=0.3, num_control_tokens=2,
    )  # fmt: skip
    assert torch.equal(layer.gradmem_projection["default"].weight, torch.eye(32))
    assert torch.equal(layer.gradmem_write_head["default"].weight, backbone.get_output_embeddings().weight)
    assert layer.gradmem_write_head["default"].weight is not backbone.get_output_embeddings().weight
    assert (layer.gradmem_start_gain["default"] == START_GAIN).all()
    assert (layer.gradmem_pool_gain["default"] == 1).all()
    assert layer.gradmem_log_write_lr["default"].shape == (2, 5, 32)
    torch.testing.assert_close(layer.gradmem_log_write_lr["default"].exp(), torch.full((2, 5, 32), 0.3))
    assert layer.prefix(torch.zeros(3, 5, 32), "read", "default").shape == (3, 9, 32)


def test_control_vectors_of_write_and_read_surround_the_memory():
    layer = slots(tiny(), num_control_tokens=2)
    memory = torch.randn(3, 5, 32)
    for phase in ("write", "read"):
        prefix = layer.prefix(memory, phase, "default")
        start, end = (getattr(layer, f"gradmem_{phase}_{side}")["default"] for side in ("start", "end"))
        assert torch.equal(prefix[:, 2:7], memory)
        assert (prefix[:, :2] == start).all()
        assert (prefix[:, 7:] == end).all()


def test_tensors_of_unused_options_are_not_made():
    names = {name.split(".")[0] for name, _ in slots(tiny()).named_parameters()}
    assert names == {"gradmem_memory"}


def test_memory_needs_one_active_adapter():
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=2))
    model.add_adapter("other", GradMemConfig(num_memory_tokens=2))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="exactly one active adapter, got 2"):
        model.write(tokens(1, 4))
