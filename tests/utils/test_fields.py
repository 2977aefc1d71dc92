"""Configurations: read from YAML and settings in bounded time, and a directory claimed by one of them."""

import json

import pytest

from gradmem_adapter.utils.fields import claim_directory, from_json, from_yaml, read_fields, released_on_error

NINE = ", ".join(["*{0}{1}"] * 9)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("-2E+4", -20000.0), ("1.5", 1.5), ("12", 12), ("a1e3", "a1e3"), ("1e3x", "1e3x"), ("", None),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}), ("{a: {<<: &x {c: 1}, d: 2}}", {"a": {"c": 1, "d": 2}}),
    ],
)  # fmt: skip
def test_yaml(text, value):
    assert from_yaml(text, "it") == value


@pytest.mark.parametrize("form", ["a{0}: &a{0} [{1}]\n", "a{0}: &a{0} {{<<: [{1}]}}\n", "a{0}: &a{0} {{x: [{1}]}}\n"])
def test_what_only_grows_when_it_is_read(form):
    text = "a0: &a0 {x: 1}\n" + "".join(form.format(i, NINE.format("a", i - 1)) for i in range(1, 30))
    with pytest.raises(ValueError, match="it is not YAML that can be read: it holds more than 10,000 values"):
        from_yaml(text, "it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "more than 10,000 values"),
        ("[" * 5000, "it has lists in lists without an end"),
        ("a:\n b: 2026-01-01", "line 2 has a timestamp; put it in quotes"),
        ("a: !!python/object/apply:os.system [true]", "line 1 has a os.system"),
        ("1: 2", "line 1 has a field whose name is no text"),
        ("a: !!int x", "invalid literal"),
        ("a: \x01", "not allowed"),
    ],
)
def test_what_no_configuration_holds(text, message):
    with pytest.raises(ValueError, match=message):
        from_yaml(text, "it")


def test_deep_json():
    with pytest.raises(ValueError, match="it is not JSON: maximum recursion depth"):
        from_json("[" * 100_000, "it")


def test_a_file_with_a_mark_and_settings(tmp_path):
    (tmp_path / "a.yaml").write_text("tasks: [{name: x}, {name: y}]\n", encoding="utf-8-sig")
    settings = ["tasks.1.name=z", "tasks.0=3", "memory.write_lr=1e-2"]
    assert read_fields(tmp_path / "a.yaml", settings) == {"tasks": [3, {"name": "z"}], "memory": {"write_lr": 0.01}}
    for setting in ("tasks.2=3", "tasks.x.name=3", "tasks.9.name=3"):
        with pytest.raises(ValueError, match=r"there is a list, which has no entry .* but those from 0 to 1"):
            read_fields(tmp_path / "a.yaml", [setting])
    (tmp_path / "a.yaml").write_text("#" * 2**19)
    with pytest.raises(ValueError, match="is not read"):
        read_fields(tmp_path / "a.yaml")


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path):
    file = tmp_path / "run" / "run.json"
    claim_directory(file, {"a": 1})
    with pytest.raises(ValueError, match="wrong"), released_on_error(file):
        raise ValueError("wrong")
    assert not file.parent.exists()


def test_what_was_trained_stays(tmp_path):
    file = tmp_path / "run" / "run.json"
    claim_directory(file, {"a": 1})
    (file.parent / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="wrong"), released_on_error(file):
        raise ValueError("wrong")
    assert json.loads(file.read_text()) == {"a": 1}
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds no run"):
        claim_directory(file, {"a": 1})
