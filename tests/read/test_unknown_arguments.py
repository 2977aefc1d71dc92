"""Unknown keyword arguments, with which an answer could silently come without its memory."""

import pytest
import torch
from reading import make
from tiny import ARCHITECTURES, tokens


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral", "bert", "bart"])
def test_a_misspelt_memory_is_refused(architecture):
    model, ids = make(architecture), tokens(1, 5)
    state = model.write(ids)
    with pytest.raises(TypeError, match=r"forward\(\) has no argument memroy\. Did you mean memory\?"):
        model(input_ids=ids, memroy=state)
    with pytest.raises(TypeError, match=r"contxt_index, foo\. Did you mean context_index\?"):
        model(input_ids=ids, memory=state, contxt_index=torch.tensor([0]), foo=1)
    with pytest.raises(TypeError, match=r"no argument context_ids\."):
        model(input_ids=ids, context_ids=ids)
    with pytest.raises(ValueError, match="memroy"):  # Transformers' own
        model.generate(ids, memroy=state)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_arguments_that_transformers_knows_are_accepted(architecture):
    model, ids = make(architecture), tokens(1, 5)
    options = {"use_cache": False, "return_dict": True, "output_hidden_states": True, "logits_to_keep": 1}
    for memory in ({}, {"memory": model.write(ids)}, {"context_input_ids": ids}):
        model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(4), **memory)
        model(input_ids=ids, token_type_ids=torch.zeros_like(ids), **options, **memory)
    model(input_ids=ids, labels=ids, shift_labels=ids)


def test_a_backbone_that_accepts_any_keyword(monkeypatch):
    """Custom code that does not say what it does with them."""
    model, ids = make(), tokens(1, 5)
    forward = model.get_base_model().forward

    def anything(**kwargs):
        assert kwargs.pop("something_of_its_own") == 1
        return forward(**kwargs)

    monkeypatch.setattr(model.get_base_model(), "forward", anything)
    with pytest.raises(TypeError, match=r"no argument memroy\. Did you mean memory\?"):
        model(input_ids=ids, memroy=1)
    model(input_ids=ids, something_of_its_own=1)
