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
for method, pattern, names in json.load(sys.stdin):
    try:
        for name in names:
            getattr(re, method)(pattern, name)
    except Exception as error:
        sys.exit(f"{pattern!r} is no regular expression: {error}")
"""


def check_patterns(config: LoraConfig, names: Iterable[str]) -> None:
    """Raise unless the regular expressions of a LoRA are done with the names of all modules in a few seconds.

    An expression such as `(a+)+$` takes longer than the universe lasts, and Python cannot interrupt it: so it is tried
    in a process of its own. Where there are plain names alone, none is started.

    Args:
        config (`LoraConfig`): of a checkpoint, perhaps.
        names (`Iterable[str]`): of the modules that PEFT will match.

    Raises:
        ValueError: an expression is none, or takes too long.
    """
    names = list(names)
    tried = [(method, pattern, names) for method, pattern in _patterns(config) if not _PLAIN.fullmatch(pattern)]
    if not tried:
        return
    command = [sys.executable, "-I", "-c", _TRY]
    try:
        done = subprocess.run(command, input=json.dumps(tried), capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        listed = ", ".join(repr(pattern) for _, pattern, _ in tried)
        raise ValueError(
            f"The regular expressions of lora_config are not done after {SECONDS} s: {listed}. Name the modules in a "
            "list, or use an expression without a repetition inside a repetition."
        ) from error
    if done.returncode:
        raise ValueError(f"lora_config cannot be used: {done.stderr.strip()}")


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
