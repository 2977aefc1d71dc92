"""Layers that let no gradient through are refused when an adapter is attached."""

import pytest
import torch
from peft import get_peft_model
from tiny import tiny, tokens
from torch import nn

from gradmem_adapter import GradMemConfig


class Rounded(nn.Module):
    """Like a layer with quantised activations: it has no derivative, but the residual stream beside it has."""

    def __init__(self, layer, cut):
        super().__init__()
        self.in_features, self.cut = layer.in_features, cut
        self.register_buffer("qweight", (layer.weight * 127).round().to(torch.int8))

    def forward(self, x):
        x = x.detach() if self.cut else x
        return x @ (self.qweight.to(x.dtype) / 127).T


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_layers_that_cut_gradients_are_refused(cut, inference_mode):
    backbone = tiny()
    layer = backbone.model.layers[1].mlp
    layer.up_proj = Rounded(layer.up_proj, cut)
    config = GradMemConfig(num_memory_tokens=2, inference_mode=inference_mode)
    if cut:
        with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj, a Rounded .*passes no gradients"):
            get_peft_model(backbone, config)
    else:
        assert get_peft_model(backbone, config).write(tokens(1, 5)).vectors.isfinite().all()


def test_a_backbone_made_in_inference_mode_is_refused():
    """PyTorch would raise only at the first write, without naming a model."""
    with torch.inference_mode():
        backbone = tiny()
    with pytest.raises(ValueError, match=r"was created inside torch.inference_mode\(\)"):
        get_peft_model(backbone, GradMemConfig(num_memory_tokens=2))
