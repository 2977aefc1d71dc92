"""Adapters are switched while other threads write and read: these get the right result or an error."""

import pytest
import torch
from adapters import make
from switching import TEXTS, Attack
from tiny import tokens

from gradmem_adapter import AdapterChangedError, GradMemConfig, GradMemModel


def test_switching_for_seconds_mixes_nothing():
    attack = Attack()
    attack.run(2)
    assert attack.results["refused"] > 0, "otherwise nothing was switched in between"


@pytest.mark.slow
def test_switching_for_a_minute_mixes_nothing():
    attack = Attack()
    attack.run(60)
    print(attack.results)
    assert min(attack.results.values()) > 0


def meanwhile(model, change):
    """Makes a change in the middle of the next forward pass of the backbone."""

    def hook(*_):
        handle.remove()
        change()

    handle = model.get_base_model().model.layers[1].register_forward_hook(hook)


@pytest.fixture
def model():
    model = make(lora_config={"r": 2, "target_modules": "all-linear"})
    model.add_adapter("other", GradMemConfig(num_memory_tokens=3))
    model.set_adapter("default")
    return model


CHANGES = {
    "switched": lambda model: model.set_adapter("other"),
    "switched there and back": lambda model: (model.set_adapter("other"), model.set_adapter("default")),
    "added": lambda model: model.add_adapter("third", GradMemConfig(num_memory_tokens=3)),
    "deleted": lambda model: model.delete_adapter("other"),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "loaded": lambda model: model.load_state_dict(model.state_dict()),
    "trained": lambda model: torch.nn.init.ones_(model.base_model.slots.gradmem_memory["default"]),
    "unloaded": lambda model: model.unload(),
}
USES = {
    "write": lambda model, state: model.write(tokens(1, 5)),
    "generate": lambda model, state: model.generate(tokens(1, 3), memory=state, max_new_tokens=2),
    "generate without memory": lambda model, state: model.generate(tokens(1, 3), max_new_tokens=2),
    "forward": lambda model, state: model(tokens(1, 3), memory=state, labels=tokens(1, 3)),
    "train": lambda model, state: model(tokens(1, 3), context_input_ids=tokens(1, 5), labels=tokens(1, 3)),
    "reconstruct": lambda model, state: model.reconstruct(state),
    "fidelity": lambda model, state: model.fidelity(state, tokens(1, 5)),
}


@pytest.mark.parametrize(
    ("change", "use"), [*((change, "write") for change in CHANGES), *(("switched", use) for use in USES)]
)
def test_every_change_is_noticed_in_every_use(model, change, use):
    state = model.write(tokens(1, 5))
    meanwhile(model, lambda: CHANGES[change](model))
    with pytest.raises(AdapterChangedError, match="Another thread"):
        USES[use](model, state)
    assert len(model.base_model.prefix_cache) == 0, "what was mixed must not be kept"


def test_nothing_is_refused_once_a_change_is_over(model):
    before = model.write(tokens(1, 5))
    model.set_adapter("other")
    model.set_adapter("default")
    assert model.write(tokens(1, 5)) == before


def test_the_attack_would_find_mixtures(monkeypatch):
    """Without the check, a state is a mixture that claims to be of one adapter."""
    attack = Attack()
    model = attack.pipeline.model
    monkeypatch.setattr(GradMemModel, "_write", GradMemModel._write.__wrapped__)
    model.set_adapter("default")
    meanwhile(model, lambda: model.set_adapter("other"))
    state = attack.pipeline.write(TEXTS[0])
    assert not any(state == states[0] for states, _ in attack.right.values())
    assert state.fingerprint in {states[0].fingerprint for states, _ in attack.right.values()}


class TestNoChange:
    """What leaves the model as it was, or failed and was repaired, is not a change."""

    def test_choosing_the_active_adapter_again_is_no_change(self, model):
        meanwhile(model, lambda: model.set_adapter("default"))
        assert len(model.write(tokens(1, 5))) == 1

    def test_loading_again_after_an_interrupt_is_no_change(self, model):
        def interrupt(*_):
            raise KeyboardInterrupt

        handle = model.get_base_model().model.layers[1].register_load_state_dict_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.load_state_dict(model.state_dict())
        handle.remove()
        model.load_state_dict(model.state_dict())
        assert len(model.write(tokens(1, 5))) == 1
