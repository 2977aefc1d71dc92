"""Modules without an adapter, trained for comparison: only their trained weights are saved and resumed."""

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import logs, rows, same, trainer, weights
from tiny import tiny
from torch import nn

from gradmem_adapter.outputs import GradMemOutput
from gradmem_adapter.training.weights import load_trained_weights


class Mean(nn.Module):
    """Answers from the mean of the context's embeddings, with a trained linear layer on it."""

    def __init__(self):
        super().__init__()
        self.backbone = tiny().requires_grad_(False)
        self.layer = nn.Linear(32, 32)

    def forward(
        self, input_ids, context_input_ids, context_attention_mask, labels, context_index=None, write_steps=1,
        attention_mask=None, max_targets=None,
    ):  # fmt: skip
        embed = self.backbone.get_input_embeddings()
        mask = context_attention_mask[..., None].to(embed.weight.dtype)
        prefix = self.layer((embed(context_input_ids) * mask).sum(1) / mask.sum(1))[context_index, None]
        output = self.backbone(
            inputs_embeds=torch.cat([prefix, embed(input_ids)], 1),
            labels=torch.cat([labels.new_full((len(labels), 1), -100), labels], 1), use_cache=False,
        )  # fmt: skip
        penalty = 0.1 * prefix.square().mean()
        return GradMemOutput(loss=output.loss + penalty, target_loss=output.loss, logits=output.logits[:, 1:])


def model():
    torch.manual_seed(0)
    return Mean()


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_module_is_trained_saved_and_resumed(tmp_path, cuda_graphs):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "cuda_graphs": cuda_graphs}
    whole = trainer(model(), tmp_path / "whole", rows(4), rows(2), **options)
    whole.train()
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == {"layer.weight", "layer.bias"}
    assert same(saved, weights(whole.model))
    resumed = trainer(model(), tmp_path / "resumed", rows(4), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(resumed.model), weights(whole.model))
    assert logs(whole, "loss")[0] > logs(whole, "target_loss")[0]  # its penalty counts
    assert "memory_norm" not in whole.state.log_history[0]
    found = whole.evaluate()
    assert "eval_loss" in found
    assert "eval_exact_match" not in found


def test_weights_of_another_model_are_refused(tmp_path):
    trainer(model(), tmp_path, rows(2)).save_model(str(tmp_path / "saved"))
    other = model()
    other.layer = nn.Linear(32, 32, bias=False)
    with pytest.raises(ValueError, match=r"tensor 'layer.bias' is unknown"):
        load_trained_weights(other, tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="no trained weights"):
        load_trained_weights(other, tmp_path)
