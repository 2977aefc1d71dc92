"""Where the memory stores of tenants are, and which stored memories no client can see."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from gradmem_adapter.serve.tenants import LOCAL, Tenants
from gradmem_adapter.store import MemoryStore, MemoryStoreError
from gradmem_adapter.utils.wording import counted

TENANTS = "tenants"
"""The folder for the stores of tenants that have keys."""


def store_of(folder: Path, tenant: str) -> MemoryStore:
    """The memory store of a tenant, which need not exist yet.

    Args:
        folder (`Path`): the store of `LOCAL`; those of other tenants are in folders inside it.
        tenant (`str`): the tenant.
    """
    return MemoryStore(folder if tenant == LOCAL else folder / TENANTS / tenant)


def unseen(folder: Path, tenants: Tenants, fingerprint: str) -> Iterator[str]:
    """Warnings about stored memories that no client can see, with a remedy: at most one for each store."""
    folders = (path.name for path in (folder / TENANTS).glob("*") if path.is_dir())
    for name in [LOCAL, *sorted(folders)]:
        store = store_of(folder, name)
        try:
            stats = store.stats()
        except (MemoryStoreError, OSError) as error:
            yield f"The store of {name!r} cannot be read: {error}"
            continue
        if name not in tenants.names and stats.states:
            memories = counted(stats.sources, "memory")
            yield f"No client sees {memories} in {store.path}. {_remedy(folder, name, tenants)}"
        elif others := stats.states - stats.models.get(fingerprint, 0):
            yield (
                f"Another model wrote {others:,} of {counted(stats.states, 'memory state')} in {store.path}: clients "
                "do not see these. Write their texts again with this model."
            )


def _remedy(folder: Path, name: str, tenants: Tenants) -> str:
    if not tenants:
        return f"They belong to the tenant {name!r}, which needs a key: pass --keys FILE."
    if name != LOCAL:
        return f"Their tenant has no key: add a line with {name} and a key to the file of --keys."
    old, new = shlex.quote(str(folder)), shlex.quote(str(folder / TENANTS / "NAME"))
    return (
        f"They were stored without keys. Add a tenant {LOCAL} to the file of --keys, or move them to a new one while "
        f"no server is running: mkdir -p {new} && mv {old}/index.sqlite* {old}/states {new}"
    )
