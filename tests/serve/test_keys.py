"""Who can see which memories, and who is let in."""

import pytest
from asking import written

from gradmem_adapter.serve import Tenants, is_loopback

KEYS = {"a" * 16: "anna", "b" * 16: "bert", "c" * 16: "anna"}
ANNA, BERT, ANNA_TOO = ({"Authorization": f"Bearer {key}"} for key in KEYS)


@pytest.fixture
def client(serve):
    return serve(tenants=Tenants(KEYS))


def posted(client, text, headers):
    return client.post("/v1/memories", json={"text": text}, headers=headers).json()["id"]


def asked(client, memory, headers):
    body = {"model": "gradmem", "messages": [{"role": "user", "content": "w1"}], "memory": memory, "max_tokens": 3}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def test_a_tenant_sees_only_its_own_memories(client):
    mine, theirs = posted(client, "w1 w2 w3", ANNA), posted(client, "w1 w4 w5", BERT)
    for headers, own, other in ((ANNA, mine, theirs), (BERT, theirs, mine), (ANNA_TOO, mine, theirs)):
        assert [one["id"] for one in client.get("/v1/memories", headers=headers).json()["data"]] == [own]
        assert client.get(f"/v1/memories/{own}", headers=headers).status_code == 200
        assert client.get(f"/v1/memories/{other}", headers=headers).status_code == 404
        assert client.delete(f"/v1/memories/{other}", headers=headers).status_code == 404
        assert asked(client, [own, other], headers).status_code == 404
        assert [place["id"] for place in asked(client, "auto", headers).json()["memory"]] == [own]


def test_the_same_text_of_two_tenants_is_two_memories(client):
    identity = posted(client, "w1 w2 w3", ANNA)
    assert client.get(f"/v1/memories/{identity}", headers=BERT).status_code == 404
    assert posted(client, "w1 w2 w3", BERT) == identity
    assert client.delete(f"/v1/memories/{identity}", headers=BERT).status_code == 200
    assert client.get(f"/v1/memories/{identity}", headers=ANNA).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {'a' * 16}"}])
@pytest.mark.parametrize("path", ["/v1/memories", "/v1/models", "/v1/chat/completions"])
def test_a_missing_or_wrong_key_is_refused(client, headers, path):
    for method in ("GET", "POST"):
        response = client.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_other_sites_cannot_use_a_server_without_keys(serve):
    client = serve()
    assert client.get("/v1/memories", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.get("/v1/memories", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    found = client.get("/v1/memories", headers={"Host": "evil.example"})
    assert found.status_code == 400
    assert "Use 127.0.0.1 or" in found.json()["error"]["message"]
    written(client, "w1")
    for host in ("[::1]:8000", "localhost:8000"):
        assert client.get("/v1/memories", headers={"Host": host}).status_code == 200


def test_the_address_it_listens_on_is_an_allowed_host(serve):
    for host, status in (("127.0.0.2", 200), ("127.0.0.3", 400)):
        found = serve(host=host).get("/v1/memories", headers={"Host": "127.0.0.2:8000"})
        assert found.status_code == status


def test_files_of_keys_are_checked(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# who may\nanna  aaaaaaaaaaaaaaaa\n\nbert bbbbbbbbbbbbbbbb # since May\n")
    assert Tenants.from_file(path)
    for wrong, said in (
        ("", "no keys"),
        ("anna", "line 1"),
        ("anna k1 k2", "line 1"),
        (f"anna {'a' * 16}\nbert {'a' * 16}", "line 2"),
        (f"../bert {'a' * 16}", "name must be"),
        ("anna short", "too short"),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=said):
            Tenants.from_file(path)


def test_loopback_addresses_are_recognised():
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.8.8.8")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.1", "example.org", "")))
