"""Regular expressions that come with a configuration, tried where they can be stopped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from peft import LoraConfig

SECONDS = 10
"""The time that all expressions of a configuration have for all names. Sensible ones take milliseconds."""
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
        wrong = f"{pattern!r} is no regular expression: {error}"
        break
print(json.dumps({"wrong": wrong}))
"""


def check_patterns(config: LoraConfig, names: Iterable[str]) -> None:
    """Raise unless the regular expressions of a LoRA are done with the names of all modules in a few seconds.

    An expression such as `(a+)+$` takes longer than the universe lasts, and Python cannot interrupt it: so it is tried
    in a process of its own. Where there are plain names alone, none is started.

    Args:
        config (`LoraConfig`): from a file, whose maker may be anybody.
        names (`Iterable[str]`): of the modules that PEFT will match.

    Raises:
        ValueError: an expression is none, or takes too long.
        ChildProcessError: there is no Python that tries them.
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
            f"The regular expressions of lora_config are not done after {SECONDS} s: {listed}. Name the modules in a "
            "list, or use an expression without a repetition inside a repetition."
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ChildProcessError(
            f"The regular expressions of lora_config are from a file, and not used before they were tried in a process "
            f"of their own: {listed}. sys.executable, {sys.executable!r}, does not start one. Let it name a Python, or "
            "replace them in the file by a list of the modules' names."
        ) from error
    if wrong is not None:
        raise ValueError(f"lora_config cannot be used: {wrong}")


def _patterns(config: LoraConfig) -> list[tuple[str, str]]:
    """What PEFT makes of the fields that hold expressions, each with the function of `re` that it calls."""
    whole = [value for value in (config.target_modules, config.exclude_modules) if isinstance(value, str)]
    keys = [*(config.rank_pattern or ()), *(config.alpha_pattern or ())]
    layers: Sequence[str] = config.layers_pattern or ()
    layers = [layers] if isinstance(layers, str) else layers
    return [
        *(("fullmatch", pattern) for pattern in whole),
        *(("match", rf"(.*\.)?({key})$") for key in keys if not _PLAIN.fullmatch(str(key))),
        *(("match", rf"(?:^|.*?\.){layer}\.(?P<idx>\d+)\.") for layer in layers if not _PLAIN.fullmatch(str(layer))),
    ]
