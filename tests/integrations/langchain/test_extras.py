"""What an extra of the package brings is named with the line that installs it."""

import importlib
import re
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "needs", "extra"),
    [
        ("middleware", "langchain.agents.middleware", "langchain"),
        ("memory", "langchain_classic.base_memory", "langchain-classic"),
    ],
)
def test_a_missing_extra_is_told_with_its_line(module, needs, extra, monkeypatch):
    name = f"langchain_gradmem.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, needs, None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(f'pip install "gradmem-adapter[{extra}]"')) as raised:
        importlib.import_module(name)
    assert raised.value.name == needs
