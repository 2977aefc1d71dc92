"""WRITE, READ and the meta-gradient equal what the authors' implementation computed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gradmem_adapter.compat import authors_names, load_authors_checkpoint

FILES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


def read(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def part(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_results_equal_the_authors(path, attention):
    options, tensors = read(path)
    base_config = options["base_config"] | {"attn_implementation": attention}
    model = load_authors_checkpoint(part(tensors, "param."), base_config, options)
    context, query, labels = tensors["context_ids"], tensors["query_ids"], tensors["labels"]

    output = model(
        input_ids=query,
        attention_mask=(query != 0).long(),
        labels=labels,
        context_input_ids=context,
        context_attention_mask=(context != 0).long(),
    )
    assert relative(output.memory, tensors["expected.memory"]) < 1e-4
    # Position 0 of the expected logits predicts the first query token, which ours has no position for.
    logits = output.logits[query != 0]
    assert relative(logits, tensors["expected.read_logits"][:, 1:][query != 0]) < 1e-4
    assert relative(output.write_losses[:, -1].mean(), tensors["expected.last_write_loss"][0]) < 1e-4
    assert relative(output.target_loss, tensors["expected.target_loss"][0]) < 1e-4
    assert relative(output.loss, tensors["expected.loss"][0]) < 1e-4

    output.loss.backward()
    parameters, gradients = authors_names(model), part(tensors, "grad.")
    assert set(parameters) == set(gradients)
    for name, expected in gradients.items():
        actual = parameters[name].grad
        actual = torch.zeros_like(expected) if actual is None else actual
        assert relative(actual, expected) < 1e-4, name

    state = model.write(context, (context != 0).long())
    assert relative(state.vectors, tensors["expected.memory"]) < 1e-4


def test_there_are_golden_files():
    assert len(FILES) == 4
