"""Model cards, and checkpoints on the hub; only the transport of the hub's client is a fake."""

import base64
import hashlib
import json
import re
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from adapters import lora
from huggingface_hub import ModelCard
from peft import get_peft_model
from tiny import tiny, tiny_tokenizer

from gradmem_adapter import Card, GradMemConfig, load_checkpoint, push_to_hub, save_checkpoint
from gradmem_adapter.cli.train_config import TrainConfig
from gradmem_adapter.training import GradMemTrainer, GradMemTrainingArguments

COMMIT = "0" * 40
ROW = {"context": "w1 w2 w3", "query": "w4", "target": "w5"}


class Files(dict):
    """A repository's files by their names."""

    def __init__(self):
        self.sent = {}
        """The authorization with which each one was first downloaded."""


@pytest.fixture
def hub(monkeypatch):
    """The files that the hub was sent, by their names. It answers like the real one."""
    files = Files()

    def answer(request):
        path, body = request.url.path, request.content
        if path == "/api/repos/create":
            return httpx.Response(200, json={"url": "https://huggingface.co/owner/mine", "id": "owner/mine"})
        if path == "/api/validate-yaml":
            base = ModelCard(json.loads(body)["content"]).data.base_model
            if base is None or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base):
                return httpx.Response(200, json={"errors": [], "warnings": []})
            said = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            return httpx.Response(400, json={"errors": [{"message": said}], "warnings": []})
        if "/preupload/" in path:
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return httpx.Response(200, json={"files": modes})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            address = f"https://huggingface.co/owner/mine/commit/{'0' * 40}"
            return httpx.Response(200, json={"commitUrl": address, "commitOid": "0" * 40})
        if path == "/api/models/owner/mine/revision/of-may":
            return httpx.Response(200, json={"id": "owner/mine", "sha": COMMIT})
        if path in (f"/api/models/owner/mine/tree/{name}" for name in ("main", COMMIT)):
            listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
            return httpx.Response(200, json=listed)
        if path.startswith(place := f"/owner/mine/resolve/{COMMIT}/"):
            content = files[path.removeprefix(place)]
            files.sent.setdefault(path.removeprefix(place), request.headers["authorization"])
            about = {"x-repo-commit": COMMIT, "etag": f'"{hashlib.sha1(content).hexdigest()}"'}
            return httpx.Response(200, content=content, headers=about)
        return httpx.Response(404)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(answer)))
    yield files
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def adapter(name="owner/backbone", **fields):
    backbone = tiny()
    backbone.name_or_path = str(name)
    config = {"num_memory_tokens": 3, "write_steps": 2, "trained_length": 1024, "lora_config": lora()} | fields
    return get_peft_model(backbone, GradMemConfig(**config))


def test_a_checkpoint_has_a_card_that_describes_it(tmp_path):
    card = Card(data="Two fairy tales.", results={"eval_f1": 0.61234, "eval_runtime": 3.0}, license="cc-by-4.0")
    save_checkpoint(adapter(refusal="not there"), tiny_tokenizer(), tmp_path / "mine", card=card)
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert (card.data.base_model, card.data.library_name, card.data.license) == ("owner/backbone", "peft", "cc-by-4.0")
    facts = ("# mine", "(m) | 3 |", "(K) | 2 by sgd", "1,024 tokens", "rank 2", "'not there'", "| f1 | 0.6123 |")
    usage = (
        "GradMemPipeline, load_checkpoint",
        'load_checkpoint("mine")',
        "import gradmem_adapter",
        "max_new_tokens=16",
        "Two fairy tales.",
    )
    assert [part for part in facts + usage if part not in card.text] == []
    assert "runtime" not in card.text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"results": {"a": "str"}}, "mapping of names to numbers, but 'a' has 'str'"),
        ({"results": {"a": None}}, "'a' has None"),
        ({"results": {1: 0.5}}, "1 has 0.5"),
        ({"results": [0.5]}, "mapping of names to numbers, such as"),
        ({"data": ["rows"]}, "data of a Card must be a text"),
        ({"license": 3}, "license of a Card must be a text"),
        ({"parent": 3}, "parent of a Card must be a text"),
    ],
)
def test_invalid_fields_of_a_card_are_refused(fields, said):
    with pytest.raises(TypeError, match=said):
        Card(**fields)
    assert Card(results={"one": 1, "tensor": torch.tensor(0.5), "numpy": torch.tensor(0.5).numpy()[()]})


@pytest.mark.parametrize("train_backbone", [False, True])
def test_no_card_names_a_directory(tmp_path, train_backbone):
    """The hub refuses it, and nobody else could use it; the configuration names it for opening it here."""
    tiny().save_pretrained(tmp_path / "base")
    model = adapter(tmp_path / "base", train_backbone=train_backbone)
    before = model.active_peft_config.to_dict()
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "mine")
    assert model.active_peft_config.to_dict() == before
    card = (tmp_path / "mine" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "base_model" not in card
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert load_checkpoint(tmp_path / "mine")[0].fingerprint() == model.fingerprint()


def test_a_card_without_facts_invents_none(tmp_path):
    save_checkpoint(adapter(trained_length=None, lora_config=None), tiny_tokenizer(), tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.license is None
    assert card.text.count("Not stated.") == 3
    assert "not known" in card.text
    (tmp_path / "mine" / "README.md").write_text("My own words.")
    save_checkpoint(adapter(), tiny_tokenizer(), tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "My own words."


def test_a_checkpoint_can_be_pushed_to_the_hub(hub, tmp_path):
    model = adapter()
    address = push_to_hub(model, tiny_tokenizer(), "owner/mine", card=Card(license="apache-2.0"), token="hf_x")
    assert address.endswith("0" * 40)
    assert b'load_checkpoint("owner/mine")' in hub["README.md"]
    loaded, _ = load_checkpoint(downloaded(hub, tmp_path), backbone=tiny())
    tokens = {"input_ids": torch.tensor([[1, 2, 3]])}
    assert torch.allclose(loaded.write(**tokens).vectors, model.write(**tokens).vectors, atol=1e-5)


def pushed_by_a_trainer(model, tokenizer, repository, folder):
    args = GradMemTrainingArguments(str(folder), report_to="none", use_cpu=True, hub_token="hf_x")
    GradMemTrainer(model, args, train_dataset=[ROW], processing_class=tokenizer).push_to_hub()


@pytest.mark.parametrize("push", [lambda *args: push_to_hub(*args[:3], token="hf_x"), pushed_by_a_trainer])
def test_an_adapter_on_a_local_directory_cannot_be_pushed(hub, tmp_path, push):
    tiny().save_pretrained(tmp_path / "base")
    model = adapter(tmp_path / "base")
    given = model, tiny_tokenizer(), "owner/mine", tmp_path / "run"
    with pytest.raises(ValueError, match=r"others do not have.*base_model_name_or_path = 'owner/name'"):
        push(*given)
    assert hub == {}
    model.active_peft_config.base_model_name_or_path = "owner/backbone"
    push(*given)
    assert b"base_model: owner/backbone\n" in hub["README.md"]
    push(adapter(tmp_path / "base", train_backbone=True), *given[1:3], tmp_path / "again")
    assert not [
        name for name, content in hub.items() if str(tmp_path).encode() in content and name != "training_args.bin"
    ]
    assert load_checkpoint(downloaded(hub, tmp_path / "mine"))


def test_a_run_that_could_not_push_is_refused_before_it_trains(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    args = GradMemTrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, push_to_hub=True)
    with pytest.raises(ValueError, match="others do not have"):
        GradMemTrainer(adapter(tmp_path / "base"), args, train_dataset=[ROW], processing_class=tiny_tokenizer())


@pytest.mark.parametrize("train_backbone", [False, True])
def test_a_revision_is_opened_without_downloading_other_files(hub, tmp_path, monkeypatch, train_backbone):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model, tokenizer = adapter(train_backbone=train_backbone), tiny_tokenizer()
    save_pretrained = tokenizer.save_pretrained
    monkeypatch.setattr(
        tokenizer, "save_pretrained", lambda path: save_pretrained(path) and (Path(path) / "rare.vocab").write_text("x")
    )
    push_to_hub(model, tokenizer, "owner/mine", token="hf_x")
    ours = set(hub)
    hub |= {"optimizer.pt": b"x", "last-checkpoint/adapter_model.safetensors": b"x", "adapter_model.bin": b"x"}
    options = {} if train_backbone else {"backbone": tiny()}
    loaded, _ = load_checkpoint("owner/mine", revision="of-may", token="hf_y", **options)
    assert loaded.fingerprint() == model.fingerprint()
    assert hub.sent == dict.fromkeys(ours, "Bearer hf_y")
    assert "rare.vocab" in ours


def test_a_name_may_end_with_the_revision(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = adapter()
    push_to_hub(model, tiny_tokenizer(), "owner/mine", token="hf_x")
    options = {"backbone": tiny(), "token": "hf_x"}
    assert load_checkpoint("owner/mine@of-may", **options)[0].fingerprint() == model.fingerprint()
    with pytest.raises(ValueError, match="'owner/mine@of-may' names a revision, and so does revision='v1'"):
        load_checkpoint("owner/mine@of-may", revision="v1", **options)


def test_training_from_the_hub_names_the_licence_there(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    push_to_hub(adapter(), tiny_tokenizer(), "owner/mine", token="hf_x", card=Card(license="cc-by-4.0"))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    name = "owner/mine@of-may"
    found = TrainConfig.of({"rows": "rows.jsonl", "checkpoint": name}).parent()
    assert found == {"parent": name, "parent_license": "cc-by-4.0"}


@pytest.mark.parametrize("name", ["owner/mine@", "@of-may"])
def test_a_revision_without_a_name_or_a_name_without_its_revision_is_refused(name):
    with pytest.raises(ValueError, match=r"neither a directory nor of the form owner/name@revision"):
        load_checkpoint(name, backbone=tiny())


@pytest.mark.parametrize("name", ["smollm2-135m-qa@main", "mine@v1"])
def test_the_name_of_a_directory_ends_with_no_revision(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"revision applies only to a repository on the hub, but .* is the directory"):
        load_checkpoint(name, backbone=tiny())


def test_a_directory_has_no_revision(tmp_path):
    save_checkpoint(adapter(), tiny_tokenizer(), tmp_path / "mine")
    with pytest.raises(
        ValueError, match=r"revision applies only to a repository on the hub, but '.*mine' is the directory"
    ):
        load_checkpoint(tmp_path / "mine", revision="v1", backbone=tiny())


def test_a_push_replaces_the_earlier_checkpoint(hub, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    push_to_hub(adapter(train_backbone=True, lora_config=None), tokenizer, "owner/mine", token="hf_x")
    assert {"chat_template.jinja", "backbone/config.json"} <= set(hub)
    hub |= {"README.md": b"My own words.", "notes/backbone/plan.txt": b"mine"}
    tokenizer.chat_template = None
    push_to_hub(adapter(), tokenizer, "owner/mine", card=Card(license="mit"), token="hf_x")
    assert [name for name in hub if "backbone" in name or "chat" in name] == ["notes/backbone/plan.txt"]
    assert hub["README.md"] == b"My own words."
    load_checkpoint(downloaded(hub, tmp_path), backbone=tiny())


def downloaded(hub, folder):
    """The files of a repository in a folder."""
    for name, content in hub.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_the_trainer_pushes_a_card_with_its_metrics(hub, tmp_path):
    args = GradMemTrainingArguments(
        str(tmp_path / "run"), max_steps=1, report_to="none", use_cpu=True, hub_token="hf_x", disable_tqdm=True
    )
    trainer = GradMemTrainer(
        adapter(), args, train_dataset=[ROW], eval_dataset=[ROW], processing_class=tiny_tokenizer()
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.push_to_hub(license="mit", dataset=["One row.", "Another."])
    card = hub["README.md"].decode()
    assert "license: mit" in card
    assert "One row., Another." in card
    assert f"| loss | {metrics['eval_loss']:.4g} |" in card
    assert 'load_checkpoint("owner/mine")' in card
    assert "adapter_model.safetensors" in hub


def pushing(folder, model, tokenizer, **options):
    fields = {"max_steps": 1, "report_to": "none", "use_cpu": True, "hub_token": "hf_x", "disable_tqdm": True}
    args = GradMemTrainingArguments(str(folder), **fields | options)
    return GradMemTrainer(model, args, train_dataset=[ROW], processing_class=tokenizer)


def test_a_push_of_the_trainer_replaces_the_earlier_checkpoint(hub, tmp_path):
    tokenizer = tiny_tokenizer()
    pushing(tmp_path / "a", adapter(train_backbone=True, lora_config=None), tokenizer).push_to_hub()
    assert {"chat_template.jinja", "backbone/config.json"} <= set(hub)
    hub["notes/plan.txt"] = b"mine"
    tokenizer.chat_template = None
    pushing(tmp_path / "b", adapter(), tokenizer).push_to_hub()
    assert not [name for name in hub if "backbone" in name or "chat" in name]
    assert hub["notes/plan.txt"] == b"mine"
    load_checkpoint(downloaded(hub, tmp_path / "c"), backbone=tiny())


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_checkpoints_pushed_during_training_open(hub, tmp_path, strategy):
    """Their digests are their own, whichever run wrote the output directory before."""
    options = {"push_to_hub": True, "save_steps": 1, "hub_strategy": strategy, "hub_always_push": True}
    with_backbone = adapter(train_backbone=True, lora_config=None)
    pushing(tmp_path / "run", with_backbone, tiny_tokenizer()).save_model()
    for i, model in enumerate((with_backbone, adapter())):
        trainer = pushing(tmp_path / "run", model, tiny_tokenizer(), **options)
        trainer.train()
        loaded, _ = load_checkpoint(downloaded(hub, tmp_path / f"{i}"), backbone=None if i == 0 else tiny())
        tokens = {"input_ids": torch.tensor([[5, 6, 7]])}
        assert torch.allclose(loaded.write(**tokens).vectors, model.eval().write(**tokens).vectors, atol=1e-5)
    places = {name.partition("/")[0] for name in hub if name.endswith("/optimizer.pt")}
    assert places == {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1"}}.get(strategy, set())
    assert not [name for name in hub if "backbone" in name]
