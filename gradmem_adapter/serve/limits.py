"""What a server takes at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; what goes beyond them is refused at once.

    Args:
        body_bytes (`int`, *optional*, defaults to 4 MiB): of a request, and so of a text.
        writes (`int`, *optional*, defaults to 16): texts that are being written or wait for it.
        reads (`int`, *optional*, defaults to 256): prompts that are being answered or wait for it.
        batch (`int`, *optional*, defaults to 16): prompts that are answered together.
        states (`int`, *optional*, defaults to 4): memory states that an answer may come from.
        new_tokens (`int`, *optional*, defaults to 1024): of an answer.
        prompts (`int`, *optional*, defaults to 64): of one request to `/v1/completions`.
        write_steps (`int`, *optional*, defaults to 200): that a request may ask for.
        grace (`int`, *optional*, defaults to 30): seconds that requests have to end when the server is stopped.
    """

    body_bytes: int = 4 * 2**20
    writes: int = 16
    reads: int = 256
    batch: int = 16
    states: int = 4
    new_tokens: int = 1024
    prompts: int = 64
    write_steps: int = 200
    grace: int = 30
