"""An exported model answers in plain Transformers as the adapter does from memory, token for token."""

import json
import os
import stat

import pytest
import torch
from adapters import lora, make
from peft import PeftModel
from tiny import ARCHITECTURES, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradmem_adapter import load_checkpoint
from gradmem_adapter.export import export_model
from gradmem_adapter.export.huggingface import CONVERTER
from gradmem_adapter.utils.shipped import QA


def plain(path, merge=True):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model if merge else PeftModel.from_pretrained(model, str(path / "lora")).eval()


def answers(model, prefix, ids, **options):
    """New tokens of a model that knows no memory."""
    query = model.get_input_embeddings()(ids)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
    embeddings = torch.cat([prefix.expand(len(ids), -1, -1), query], dim=1)
    return model.generate(inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2]), **options)


def from_memory(model, state, ids, **options):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(input_ids=ids, memory=state, **options)[:, ids.shape[1] :]


@pytest.fixture
def model():
    return make(lora_config=lora(), num_control_tokens=1, memory_projection="shared")


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "LoRA"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_transformers_gives_the_same_answers(architecture, merge, tmp_path):
    model = make(architecture, lora_config=lora())
    state = model.write(tokens(1, 9))
    export_model(model, tiny_tokenizer(), tmp_path / "model", merge=merge)
    ids = tokens(2, 5, seed=1)
    expected = from_memory(model, state, ids)
    found = answers(plain(tmp_path / "model", merge), model.prefix_embeddings(state), ids)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
@pytest.mark.parametrize("merge", [True, False])
def test_other_kinds_of_lora_are_exported(options, merge, tmp_path):
    model = make(lora_config=lora(**options))
    state, ids = model.write(tokens(1, 9)), tokens(2, 5, seed=1)
    export_model(model, tiny_tokenizer(), tmp_path / "model", merge=merge)
    found = answers(plain(tmp_path / "model", merge), model.prefix_embeddings(state), ids)
    assert found.tolist() == from_memory(model, state, ids).tolist()


@pytest.mark.parametrize("merge", [True, False])
def test_a_write_only_lora_is_left_out(merge, tmp_path):
    model = make(lora_config=lora(), lora_phase="write")
    export_model(model, tiny_tokenizer(), tmp_path / "model", merge=merge)
    assert not (tmp_path / "model" / "lora").exists()
    state, ids = model.write(tokens(1, 9)), tokens(2, 5, seed=1)
    found = answers(plain(tmp_path / "model"), model.prefix_embeddings(state), ids)
    assert found.tolist() == from_memory(model, state, ids).tolist()
    weights, own = plain(tmp_path / "model").state_dict(), make().get_base_model().state_dict()
    assert all(torch.equal(weights[name], own[name]) for name in weights)


def test_a_trained_backbone_and_a_second_adapter_are_exported(tmp_path):
    model = make(train_backbone=True)
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(1.5)
    export_model(model, tiny_tokenizer(), tmp_path / "trained")
    state, ids = model.write(tokens(1, 9)), tokens(2, 5, seed=1)
    found = answers(plain(tmp_path / "trained"), model.prefix_embeddings(state), ids)
    assert found.tolist() == from_memory(model, state, ids).tolist()

    model = make(lora_config=lora())
    model.add_adapter("other", make(lora_config=lora()).active_peft_config)
    model.set_adapter("other")
    state = model.write(tokens(1, 9))
    for merge in (True, False):
        export_model(model, tiny_tokenizer(), tmp_path / str(merge), merge=merge)
        found = answers(plain(tmp_path / str(merge), merge), model.prefix_embeddings(state), ids)
        assert found.tolist() == from_memory(model, state, ids).tolist()


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 4.0}])
def test_rope_settings_have_the_names_that_engines_expect(scaling, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 123.0} | scaling
    model = make(lora_config=lora(), backbone={"rope_parameters": rope})
    export_model(model, tiny_tokenizer(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["rope_theta"], config.get("rope_scaling", {})) == (123.0, scaling)
    assert plain(tmp_path / "model").config.rope_parameters == rope
    state, ids = model.write(tokens(1, 9)), tokens(2, 5, seed=1)
    found = answers(plain(tmp_path / "model"), model.prefix_embeddings(state), ids)
    assert found.tolist() == from_memory(model, state, ids).tolist()


def test_exporting_leaves_the_model_unchanged(model, tmp_path):
    tokenizer = tiny_tokenizer()
    before, template = model.fingerprint(), tokenizer.chat_template
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, tokenizer, tmp_path / "model")
    assert model.fingerprint() == before
    assert tokenizer.chat_template == template
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_an_export_is_complete_or_absent(model, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        export_model(model, tiny_tokenizer(), tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        export_model(model, tiny_tokenizer(), tmp_path / "file")
    monkeypatch.setattr("gradmem_adapter.export.huggingface.save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_model(model, tiny_tokenizer(), tmp_path / "model", merge=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_exported_files_are_readable_by_others(model, tmp_path):
    before = os.umask(0o022)
    try:
        export_model(model, tiny_tokenizer(), tmp_path / "model", merge=False)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {path.name: 0o644 for path in files}


def test_models_that_cannot_be_exported_are_refused(tmp_path):
    tied = make(lora_config=lora(target_modules=["embed_tokens"]))
    tied.get_base_model().lm_head.weight = tied.get_base_model().model.embed_tokens.base_layer.weight
    with pytest.raises(NotImplementedError, match="one tensor"):
        export_model(tied, tiny_tokenizer(), tmp_path / "model")
    tied.get_base_model().is_quantized = True
    with pytest.raises(NotImplementedError, match="quantised"):
        export_model(tied, tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(ValueError, match="merge"):
        export_model(make(), tiny_tokenizer(), tmp_path / "model", merge=False, gguf="float32")


class TestGguf:
    @pytest.fixture
    def path(self, tmp_path, monkeypatch):
        """A PATH with a single directory."""
        (tmp_path / "bin").mkdir()
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        return tmp_path / "bin"

    @staticmethod
    def converter(path, code):
        (path / CONVERTER).write_text(code)
        (path / CONVERTER).chmod(stat.S_IRWXU)

    def test_the_file_is_made_by_llama_cpp(self, model, path, tmp_path):
        self.converter(path, "import sys; open(sys.argv[3], 'w').write(' '.join([*sys.argv[2:3], *sys.argv[4:]]))")
        export_model(model, tiny_tokenizer(), tmp_path / "model", gguf="float16")
        assert (tmp_path / "model" / "model.gguf").read_text() == "--outfile --outtype f16"
        assert (tmp_path / "model" / "config.json").is_file()

    def test_without_llama_cpp_nothing_is_written(self, model, path, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"llama\.cpp"):
            export_model(model, tiny_tokenizer(), tmp_path / "model", gguf="float32")
        self.converter(path, "import sys; sys.exit('unknown architecture')")
        with pytest.raises(RuntimeError, match="unknown architecture"):
            export_model(model, tiny_tokenizer(), tmp_path / "model", gguf="float32")
        assert not (tmp_path / "model").exists()


@pytest.mark.smollm
@pytest.mark.parametrize("merge", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["merged", "LoRA"])
def test_the_shipped_adapter_is_exported(merge, tmp_path):
    model, tokenizer = load_checkpoint(QA)
    text = "The heron lives on the island of Mull. It eats eels, and its nest is in an old oak by the harbour."
    state = model.write(**tokenizer(text, return_tensors="pt"))
    export_model(model, tokenizer, tmp_path / "model", merge=merge)
    other, model_tokenizer = plain(tmp_path / "model", merge), AutoTokenizer.from_pretrained(tmp_path / "model")
    for question in ("Where does the heron live?", "What does it eat?", "Where is its nest?"):
        chat = [{"role": "user", "content": question}]
        ids, exported = (
            one.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            for one in (tokenizer, model_tokenizer)
        )
        assert exported.tolist() == ids.tolist()
        found = answers(other, model.prefix_embeddings(state), ids, pad_token_id=tokenizer.pad_token_id)
        expected = from_memory(model, state, ids, pad_token_id=tokenizer.pad_token_id)
        assert found.tolist() == expected.tolist()
