"""Regular expressions from a configuration, tested in a process that can be stopped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from peft import LoraConfig

SECONDS = 10
"""The time limit for all expressions of a configuration on all names. Sensible ones take milliseconds."""
_PLAIN = re.compile(r"[\w.^$-]*")
"""Expressions that neither fail nor take long."""
_TRY = """
import json, re, sys
wrong = None
for method, pattern, names in json.load(sys.stdin):
    try:
        for name in names:
            getattr(re, method)(pattern, name)
    except Exception as error:
        wrong = f"{pattern!r} is not a regular expression: {error}"
        break
print(json.dumps({"wrong": wrong}))
"""


def check_patterns(config: LoraConfig, names: Iterable[str]) -> None:
    """Raise unless the regular expressions of a LoRA match the names of all modules within a few seconds.

    An expression such as `(a+)+$` may never finish, and Python cannot interrupt it, so expressions are tested in a
    separate process. If there are only plain names, no process is started.

    Args:
        config (`LoraConfig`): from a file, which may come from anybody.
        names (`Iterable[str]`): the names of the modules that PEFT will match.

    Raises:
        ValueError: an expression is invalid or takes too long.
        ChildProcessError: no Python process can be started to test them.
    """
    names = list(names)
    tried = [(method, pattern, names) for method, pattern in _patterns(config) if not _PLAIN.fullmatch(pattern)]
    if not tried:
        return
    listed = ", ".join(repr(pattern) for _, pattern, _ in tried)
    try:
        command = [sys.executable or "", "-I", "-c", _TRY]
        done = subprocess.run(command, input=json.dumps(tried), capture_output=True, text=True, timeout=SECONDS)
        wrong = json.loads(done.stdout)["wrong"]
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"The regular expressions of lora_config did not finish within {SECONDS} s: {listed}. List the module "
            "names instead, or use an expression without nested repetitions."
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ChildProcessError(
            "The regular expressions of lora_config come from a file and must be tested in a separate process before "
            f"they are used: {listed}. But sys.executable ({sys.executable!r}) does not start Python. Set it to a "
            "Python interpreter, or replace the expressions in the file by a list of module names."
        ) from error
    if wrong is not None:
        raise ValueError(f"lora_config cannot be used: {wrong}")


def _patterns(config: LoraConfig) -> list[tuple[str, str]]:
    """The expressions that PEFT builds from the fields, each with the function of `re` that it calls."""
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(value := getattr(config, name), dict | None):
            raise ValueError(f"lora_config cannot be used: {name} must be a dict, got {value!r}.")
    whole = [value for value in (config.target_modules, config.exclude_modules) if isinstance(value, str)]
    keys = [*(config.rank_pattern or ()), *(config.alpha_pattern or ())]
    layers: Sequence[str] = config.layers_pattern or ()
    layers = [layers] if isinstance(layers, str) else layers
    return [
        *(("fullmatch", pattern) for pattern in whole),
        *(("match", rf"(.*\.)?({key})$") for key in keys if not _PLAIN.fullmatch(str(key))),
        *(("match", rf"(?:^|.*?\.){layer}\.(?P<idx>\d+)\.") for layer in layers if not _PLAIN.fullmatch(str(layer))),
    ]
