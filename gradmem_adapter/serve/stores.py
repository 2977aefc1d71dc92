"""Where the memory stores of tenants are, and what of them nobody is answered from."""

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
    """The memory store of a tenant, which need not be there yet.

    Args:
        folder (`Path`): the store of `LOCAL`; those of other tenants are in folders of it.
        tenant (`str`): whose.
    """
    return MemoryStore(folder if tenant == LOCAL else folder / TENANTS / tenant)


def unseen(folder: Path, tenants: Tenants, fingerprint: str) -> Iterator[str]:
    """What is stored and no client sees, and what to do: a sentence for each store where there is something.

    Args:
        folder (`Path`): as for `store_of`.
        tenants (`Tenants`): who is served.
        fingerprint (`str`): of the model that answers.
    """
    folders = (path.name for path in (folder / TENANTS).glob("*") if path.is_dir())
    for name in [LOCAL, *sorted(folders)]:
        store = store_of(folder, name)
        try:
            stats = store.stats()
        except (MemoryStoreError, OSError) as error:
            yield f"The store of {name!r} cannot be read: {error}"
            continue
        if name not in tenants.names and stats.states:
            yield f"Memories in {store.path} that no client sees: {stats.sources:,}. {_remedy(folder, name, tenants)}"
        elif others := stats.states - stats.models.get(fingerprint, 0):
            yield (
                f"Another model wrote {others:,} of {counted(stats.states, 'memory state')} in {store.path}, and what "
                "another one wrote is not seen. Write those texts again with this one."
            )


def _remedy(folder: Path, name: str, tenants: Tenants) -> str:
    if not tenants:
        return f"They are of the tenant {name!r}, who needs a key: pass --keys FILE."
    if name != LOCAL:
        return f"No key is of their tenant: write a line with {name} and a key into the file of --keys."
    old, new = shlex.quote(str(folder)), shlex.quote(str(folder / TENANTS / "NAME"))
    return (
        f"They were stored without keys. Name a tenant {LOCAL} in the file of --keys, or give them to a new one while "
        f"no server runs: mkdir -p {new} && mv {old}/index.sqlite* {old}/states {new}"
    )
