"""Every table that README and docs show, made from the result files."""

from __future__ import annotations

import re
from pathlib import Path

from . import benchmarks, models, prompting, tasks, training, variants
from .cells import markdown
from .tasks import results_table

ROOT = Path(__file__).parent.parent.parent
_PARTS = (tasks, benchmarks, prompting, training, models, variants)
TABLES = {table.__name__: table for part in _PARTS for table in part.TABLES}
"""Tables by the name of their block in README and docs."""
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)

__all__ = ["ROOT", "TABLES", "fill", "markdown", "results_table"]


def fill(root: Path = ROOT, write: bool = True) -> list[str]:
    """Fill the `<!-- table: NAME -->` ... `<!-- /table -->` blocks of README.md and docs/*.md.

    Args:
        root (`Path`): the directory of README.md and docs.
        write (`bool`, *optional*, defaults to `True`): False: change nothing.

    Returns:
        The blocks that differed, as "README.md: answers".

    Raises:
        ValueError: a block names an unknown table.
    """
    differed = []
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda block, page=page: block[1] + _table(block[2], page) + block[3], text)  # type: ignore[misc]
        old, made = ([block[2] + block[0] for block in BLOCK.finditer(content)] for content in (text, new))
        names = [block[2] for block in BLOCK.finditer(text)]
        differed += [f"{page.name}: {name}" for name, a, b in zip(names, old, made, strict=True) if a != b]
        if write and new != text:
            page.write_text(new, encoding="utf-8")
    return differed


def _table(name: str, page: Path) -> str:
    if name not in TABLES:
        raise ValueError(f"{page} has a block for the unknown table {name!r}; there are {', '.join(sorted(TABLES))}.")
    return markdown(TABLES[name]())
