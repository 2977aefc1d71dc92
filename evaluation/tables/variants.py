"""The table of ways to load a backbone."""

from __future__ import annotations

from .cells import Frame, read

VERDICTS = {
    "passes": "passes",
    "refused": "refused when the adapter is attached",
    "wrong": "wrong",
    "crashes": "crashes later",
    "not run": "not run",
}
"""The verdicts of `evaluation.variants.check`, in words."""
FAR = 0.1
"""Relative error above which a finite difference counts as far off; in 16 bits it stays below."""


def variants() -> Frame:
    """The verdict for each variant, and how far WRITE, READ and outer gradients are from plain autograd."""
    table = read("variants")
    errors = table[["WRITE", "WRITE again", "READ", "exact", "finite_difference"]].map(
        lambda value: "" if value != value else f"{value:.0e}"
    )
    far = (table["finite_difference"] > FAR).map({True: ", far off: use `exact`", False: ""})
    reasons = [
        f"{VERDICTS[verdict]}: {reason}" if verdict == "not run" else VERDICTS[verdict]
        for verdict, reason in zip(table["verdict"], table["reason"], strict=True)
    ]
    return Frame(
        {
            "backbone": table["dataset"],
            "found": reasons,
            "WRITE": errors["WRITE"],
            "WRITE again": errors["WRITE again"],
            "READ": errors["READ"],
            "`exact`": errors["exact"],
            "`finite_difference`": errors["finite_difference"] + far,
        }
    )


TABLES = (variants,)
