"""WriteOptions: checked on construction, passed on as one object."""

import dataclasses

import pytest
from peft import get_peft_model
from tiny import tiny, tokens

from gradmem_adapter import GradMemConfig, Study, WriteOptions
from gradmem_adapter.write.options import WriteFields

FIELDS = [field.name for field in dataclasses.fields(WriteOptions)]


@pytest.fixture(scope="module")
def model():
    return get_peft_model(tiny(), GradMemConfig(num_memory_tokens=3, write_lr=0.3)).eval()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -1}, "steps must be a non-negative integer"),
        ({"steps": True}, "steps must be a non-negative integer"),
        ({"steps": 1.0}, "steps must be a non-negative integer"),
        ({"lr": 0.0}, "lr must be a finite positive number"),
        ({"lr": float("inf")}, "lr must be a finite positive number"),
        ({"lr": True}, "lr must be a finite positive number"),
        ({"lr": "0.1"}, "lr must be a finite positive number"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"optimizer": ["adam"]}, "optimizer must be one of"),
        ({"tolerance": 1.0}, "tolerance must be at least 0"),
        ({"max_memory": 0}, "max_memory must be a positive integer .bytes. or .auto., got 0"),
        ({"max_memory": 1e9}, "max_memory must be a positive integer"),
        ({"max_memory": "8 GiB"}, "max_memory must be a positive integer"),
        ({"tolerance": "x"}, "tolerance must be at least 0"),
        ({"stop_when_recovered": "no"}, "stop_when_recovered must be True or False"),
        ({"last_loss": "false"}, "last_loss must be True or False"),
        ({"tolerance": 0.1, "last_loss": False}, "tolerance needs the loss after the last step"),
        ({"compile": "yes"}, "compile must be True, False or 'auto'"),
    ],
    ids=str,
)
def test_invalid_options_are_refused_on_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        WriteOptions(**fields)


def test_options_compare_by_value_and_are_frozen():
    assert WriteOptions(steps=2) == WriteOptions(steps=2) != WriteOptions()
    assert len({WriteOptions(steps=2), WriteOptions(steps=2)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        WriteOptions().steps = 3


def test_keywords_override_fields():
    options = WriteOptions(steps=2, lr=0.1)
    assert WriteOptions.of(options, steps=0, lr=None) == WriteOptions(steps=0, lr=0.1)
    assert WriteOptions.of() == WriteOptions()
    with pytest.raises(TypeError, match=r"no option stesp\. Did you mean steps\?"):
        WriteOptions.of(options, stesp=3)
    with pytest.raises(TypeError, match="options must be WriteOptions, got dict"):
        WriteOptions.of({"steps": 2})
    with pytest.raises(ValueError, match="tolerance needs the loss"):
        WriteOptions.of(WriteOptions(tolerance=0.1), last_loss=False)


def test_options_and_keywords_give_the_same_states(model):
    ids = tokens(2, 7)
    expected = model.write(ids, steps=3, lr=0.2, optimizer="adam", last_loss=False)
    options = WriteOptions(steps=3, lr=0.2, optimizer="adam", last_loss=False)
    assert model.write(ids, options=options).to_bytes() == expected.to_bytes()
    assert model.write_many(list(ids), options=options).to_bytes() == expected.to_bytes()
    assert model.write(ids, options=options, steps=1).write_losses.shape == (2, 2)


@pytest.mark.parametrize("method", ["write", "write_many"])
def test_methods_take_every_option_by_name(method, model):
    assert list(WriteFields.__annotations__) == FIELDS
    values = {"steps": 0, "lr": 0.1, "optimizer": "adam", "tolerance": 0.1, "stop_when_recovered": True}
    values |= {"last_loss": True, "compile": False, "objective": "reconstruction", "study": Study()}
    values |= {"max_memory": 2**30}
    assert list(values) == FIELDS
    getattr(model, method)(tokens(1, 4), **values)
    with pytest.raises(TypeError, match=r"WRITE has no option stesp\. Did you mean steps\? See help"):
        getattr(model, method)(tokens(1, 4), stesp=3)
    with pytest.raises(TypeError, match=r"WRITE has no option stesp\. Did you mean steps\? See help"):
        getattr(model, method)(tokens(1, 4), stesp=None)
