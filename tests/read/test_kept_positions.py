"""Backbones that keep something between calls: the offset of positions after images."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import tokens
from transformers import AutoConfig, AutoModelForImageTextToText

from gradmem_adapter import GradMemConfig, get_peft_model

TEXT = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
VISION = {
    "depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 1,
    "out_hidden_size": 32, "intermediate_size": 48, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}  # fmt: skip


def backbone_of(kind):
    torch.manual_seed(0)
    text = TEXT | (LINEAR if kind == "qwen3_5" else {})
    config = AutoConfig.for_model(kind, text_config=text, vision_config=VISION, image_token_id=60, video_token_id=59)
    backbone = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return backbone.eval()


@pytest.mark.parametrize(
    ("kind", "hooked"),
    [("qwen2_vl", False), ("qwen2_vl", True), ("qwen2_5_vl", False), ("qwen3_vl", False), ("qwen3_5", False)],
)
def test_the_offset_of_an_earlier_call_does_not_affect_memory(kind, hooked):
    backbone = backbone_of(kind)
    if hooked:  # as a device map does
        add_hook_to_module(backbone, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=3, memory_init_std=0.5, start="context")).eval()
    context, query = tokens(2, 9) % 59, tokens(2, 5, seed=1) % 59

    def results():
        state = model.write(context)
        text = model.generate(query, memory=state, max_new_tokens=3, do_sample=False, eos_token_id=None)
        again = model.generate(query, memory=state, max_new_tokens=3, do_sample=False, eos_token_id=None)
        loss = model(input_ids=query, labels=query, memory=state, max_targets=5).loss
        logits = model(input_ids=query, memory=state).logits
        return state.vectors, state.write_losses, logits, text, again, loss, model.reconstruct(state, 3)

    before = results()
    assert backbone.model.rope_deltas is None
    assert torch.equal(before[3], before[4])
    backbone.model.rope_deltas = left = torch.tensor([[-3], [-4], [-5]])  # as after three prompts with images
    for found, expected in zip(results(), before, strict=True):
        assert torch.equal(found, expected)
    assert backbone.model.rope_deltas is left
