"""The limits of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server. Requests that exceed one are refused at once.

    Args:
        body_bytes (`int`, *optional*, defaults to 4 MiB): bytes in a request, and thus in a text.
        writes (`int`, *optional*, defaults to 16): texts being written or waiting to be.
        reads (`int`, *optional*, defaults to 256): prompts being answered or waiting to be.
        batch (`int`, *optional*, defaults to 16): prompts that are answered together.
        states (`int`, *optional*, defaults to 4): memory states that an answer may come from.
        new_tokens (`int`, *optional*, defaults to 1024): tokens in an answer.
        prompts (`int`, *optional*, defaults to 64): prompts in one request to `/v1/completions`.
        write_steps (`int`, *optional*, defaults to 200): write steps that a request may ask for.
        grace (`int`, *optional*, defaults to 30): seconds that requests have to finish when the server is stopped.
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
