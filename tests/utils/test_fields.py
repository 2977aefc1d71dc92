"""Configurations: read from YAML and settings in bounded time, and a directory that one run claims."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from accelerate import PartialState

from gradmem_adapter.utils.fields import claimed as fields_claimed
from gradmem_adapter.utils.fields import from_json, from_yaml, read_fields

NINE = ", ".join(["*{0}{1}"] * 9)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("-2E+4", -20000.0), ("1.5", 1.5), ("12", 12), ("a1e3", "a1e3"), ("1e3x", "1e3x"), ("", None),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}), ("{a: {<<: &x {c: 1}, d: 2}}", {"a": {"c": 1, "d": 2}}),
    ],
)  # fmt: skip
def test_yaml_values_are_read(text, value):
    assert from_yaml(text, "it") == value


@pytest.mark.parametrize("form", ["a{0}: &a{0} [{1}]\n", "a{0}: &a{0} {{<<: [{1}]}}\n", "a{0}: &a{0} {{x: [{1}]}}\n"])
def test_yaml_that_expands_exponentially_is_refused(form):
    text = "a0: &a0 {x: 1}\n" + "".join(form.format(i, NINE.format("a", i - 1)) for i in range(1, 30))
    with pytest.raises(ValueError, match="it cannot be read as YAML: it holds more than 10,000 values"):
        from_yaml(text, "it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "more than 10,000 values"),
        ("[" * 5000, "it has values that are nested too deeply"),
        ("a:\n b: 2026-01-01", "line 2 has a timestamp; put it in quotes"),
        ("a: !!python/object/apply:os.system [true]", "line 1 has a os.system"),
        ("1: 2", "line 1 has a field whose name is not a string"),
        ("a: !!int x", "invalid literal"),
        ("a: \x01", "not allowed"),
    ],
)
def test_yaml_that_no_configuration_needs_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        from_yaml(text, "it")


def test_deeply_nested_json_is_refused():
    with pytest.raises(ValueError, match="it is not JSON: maximum recursion depth"):
        from_json("[" * 100_000, "it")


def test_a_file_with_a_byte_order_mark_and_settings(tmp_path):
    (tmp_path / "a.yaml").write_text("tasks: [{name: x}, {name: y}]\n", encoding="utf-8-sig")
    settings = ["tasks.1.name=z", "tasks.0=3", "memory.write_lr=1e-2"]
    assert read_fields(tmp_path / "a.yaml", settings) == {"tasks": [3, {"name": "z"}], "memory": {"write_lr": 0.01}}
    for setting in ("tasks.2=3", "tasks.x.name=3", "tasks.9.name=3"):
        with pytest.raises(ValueError, match=r"is not an index of the list, which has entries 0 to 1"):
            read_fields(tmp_path / "a.yaml", [setting])
    (tmp_path / "a.yaml").write_text("#" * 2**19)
    with pytest.raises(ValueError, match="at most 262,144"):
        read_fields(tmp_path / "a.yaml")


def claimed(file, fields):
    return fields_claimed(file, fields, PartialState(cpu=True))


def test_a_run_that_fails_at_once_leaves_no_directory(tmp_path):
    file = tmp_path / "run" / "run.json"
    with pytest.raises(ValueError, match="wrong"), claimed(file, {"a": 1}):
        raise ValueError("wrong")
    assert not file.parent.exists()


def test_a_failed_run_leaves_earlier_checkpoints(tmp_path):
    file = tmp_path / "run" / "run.json"
    with claimed(file, {"a": 1}):
        (file.parent / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="wrong"), claimed(file, {"a": 1}):
        raise ValueError("wrong")
    assert json.loads(file.read_text()) == {"a": 1}
    file.write_text("[]")
    with pytest.raises(ValueError, match="does not describe a run"), claimed(file, {"a": 1}):
        pass


def test_only_one_of_several_concurrent_runs_gets_the_directory(tmp_path):
    """Whether or not their fields are equal; once it has ended, it can be resumed."""
    file, start, tried = tmp_path / "run" / "run.json", threading.Barrier(8), threading.Barrier(8, timeout=60)

    def run(number):
        start.wait()
        with ExitStack() as claim:
            refused = None
            try:
                claim.enter_context(claimed(file, {"a": number % 2}))
            except BlockingIOError as error:
                refused = str(error)
            tried.wait()
        return refused

    with ThreadPoolExecutor(8) as threads:
        refused = list(threads.map(run, range(8)))
    has_it = refused.index(None)
    assert all("Another run is in progress in" in message for message in refused[:has_it] + refused[has_it + 1 :])
    with claimed(file, {"a": has_it % 2}):
        assert json.loads(file.read_text()) == {"a": has_it % 2}


def test_processes_of_one_run_share_its_directory(tmp_path, monkeypatch):
    file = tmp_path / "run" / "run.json"
    with claimed(file, {"a": 1}):
        monkeypatch.setattr(PartialState(), "process_index", 1)
        with claimed(file, {"a": 1}):
            pass
