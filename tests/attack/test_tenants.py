"""A tenant's store never reaches another tenant's states, whatever it is asked for."""

import pytest
from langchain_gradmem import MemoryStateStore
from tiny_pipeline import tiny_pipeline

REFERENCE = "0123456789abcdef" * 2
PATHS = [
    f"../alice/{REFERENCE}", f"./../alice/{REFERENCE}", f"x/../../alice/{REFERENCE}", f"/alice/{REFERENCE}",
    f"../bob/../alice/{REFERENCE}", "..", ".", "", "../", f"{REFERENCE}/../../alice/{REFERENCE}", REFERENCE.upper(),
    REFERENCE + "\n", REFERENCE + "\0", REFERENCE[:-1], "\uff10" * 32, None, 3, REFERENCE.encode(), ["a"],
]  # fmt: skip


@pytest.fixture(scope="module")
def states():
    return list(tiny_pipeline().write(["w1 w2 w3", "w4 w5"]))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_no_path_leads_to_another_tenant(tmp_path, states, path):
    alice, bob = (MemoryStateStore(tmp_path, namespace=name) for name in ("alice", "bob"))
    alice.mset([(REFERENCE, states[0])])
    bob.mset([(REFERENCE, states[1])])
    for attempt in (
        lambda: bob.get(path),
        lambda: bob.mget([REFERENCE, path]),
        lambda: bob.mset([(REFERENCE, states[0]), (path, states[0])]),
        lambda: bob.mdelete([REFERENCE, path]),
    ):
        with pytest.raises(ValueError, match="A reference must be 32 hexadecimal digits"):
            attempt()
    assert alice.get(REFERENCE) == states[0]
    assert bob.get(REFERENCE) == states[1], "a refused call must change nothing"


@pytest.mark.parametrize("prefix", ["", "../alice", "..", "../", "0"])
def test_a_tenant_lists_only_its_own_references(tmp_path, states, prefix):
    alice, bob = (MemoryStateStore(tmp_path, namespace=name) for name in ("alice", "bob"))
    alice.mset([(REFERENCE, states[0])])
    assert list(bob.yield_keys(prefix=prefix)) == []
    assert list(alice.yield_keys(prefix=prefix)) == ([REFERENCE] if REFERENCE.startswith(prefix) else [])


@pytest.mark.parametrize("name", ["", ".", "..", "../alice", "alice/", "/alice", "a b", "alice\n", "ä", "a" * 65, 3])
def test_invalid_namespaces_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="A namespace must be"):
        MemoryStateStore(tmp_path, namespace=name)
