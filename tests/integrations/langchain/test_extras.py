"""A missing extra of the package is named with the command that installs it."""

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
def test_the_error_for_a_missing_extra_says_how_to_install_it(module, needs, extra, monkeypatch):
    name = f"langchain_gradmem.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, needs, None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(f'pip install "gradmem-adapter[{extra}]"')) as raised:
        importlib.import_module(name)
    assert raised.value.name == needs
