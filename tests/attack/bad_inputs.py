"""Command lines that cannot work, and the files that they name: each command with each kind of bad input."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny, tiny_text, tiny_tokenizer

from gradmem_adapter import GradMemConfig, GradMemPipeline, load_backbone, load_checkpoint, save_checkpoint
from gradmem_adapter.store import MemoryStore
from gradmem_adapter.utils.directory import SUMS

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DEEP = "[" * 100_000
FLIPS, CUTS = 100, 70
"""Numbers of checkpoints with one changed bit, and of backbones with a truncated file."""
ROW = {"context": "w1 w2 w3", "query": "w1", "target": "w2"}

# ---------------------------------------------------------------- texts

TEXTS: dict[str, bytes] = {
    "empty": b"", "blank": b" \n\t\n", "binary": bytes(range(256)), "utf16": "w1 w2".encode("utf-16"),
    "latin1": "w1 \xe4".encode("latin-1"), "mark alone": b"\xef\xbb\xbf", "long": tiny_text(200).encode(),
    "cut.gz": gzip.compress(b"w1 w2 w3 " * 99)[:-9], "none.gz": b"w1 w2",
    "bytes behind.gz": gzip.compress(b"w1") + b"x",
}  # fmt: skip
NO_TEXTS = [*TEXTS, "missing", "folder", "pipe", "link to zero", "sparse", "bomb.gz", "loop", "x" * 300, "notes.txt/x"]
"""What no text can be read from: the files above, and places that are not files."""

# ---------------------------------------------------------------- checkpoints

CONFIGS: dict[str, str] = {
    "nothing": "", "cut": '{"peft_type": "GRADMEM", ', "list": "[]", "null": "null", "number": "3", "deep": DEEP,
    "zero": "\0", "another method": '{"peft_type": "LORA", "r": 8}', "unknown method": '{"peft_type": "NONE"}',
    "no method": "{}",
}  # fmt: skip
"""Texts in place of the adapter's configuration."""
FIELDS: list[dict[str, Any]] = [
    {"num_memory_tokens": 10**10}, {"num_memory_tokens": 4}, {"num_memory_tokens": "3"}, {"num_memory_tokens": None},
    {"num_memory_tokens": 0}, {"num_control_tokens": 10**10}, {"num_control_tokens": 1}, {"write_steps": -1},
    {"write_lr": float("nan")}, {"write_lr": -1.0}, {"write_lr": 1e400}, {"write_optimizer": "sgdd"}, {"start": []},
    {"learn_write_lr": "scalar"}, {"query_format": 3}, {"query_format": "x"}, {"write_head": True},
    {"meta_gradient": None}, {"train_backbone": "no"}, {"task_type": "SEQ_CLS"}, {"memory_projection": "shared"},
    {"base_model_name_or_path": None}, {"base_model_name_or_path": "nowhere/"}, {"base_model_name_or_path": 3},
    {"base_model_name_or_path": "/dev/null"}, {"base_model_name_or_path": "package:os/x.gguf"},
    {"base_model_name_or_path": "package:../x.gguf"}, {"base_model_name_or_path": "../../etc"}, {"lora_config": None},
    {"lora_config": 3}, {"lora_config": {"r": 2}}, {"lora_config": {"colour": "red"}},
]  # fmt: skip
"""Changed fields of the adapter's configuration."""
LORA: list[dict[str, Any]] = [
    {"r": 10**9}, {"r": 2**70}, {"r": 0}, {"r": -1}, {"r": "2"}, {"r": 2.5}, {"r": 3}, {"lora_alpha": "x"},
    {"lora_dropout": "x"}, {"target_modules": "(q_proj"}, {"target_modules": ["no_such"]}, {"target_modules": 5},
    {"target_modules": [None]}, {"rank_pattern": {"q_proj": 10**9}}, {"rank_pattern": {"(": 1}}, {"rank_pattern": 7},
    {"init_lora_weights": "pissa"}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"layers_to_transform": "x"},
]  # fmt: skip
"""Changed fields of the LoRA in it."""
TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "a tensor missing": lambda tensors: tensors.pop(sorted(tensors)[0]),
    "none": lambda tensors: tensors.clear(),
    "one more": lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(61, 32)}),
    "another shape": lambda tensors: tensors.update({sorted(tensors)[0]: torch.zeros(1)}),
    "another type": lambda tensors: tensors.update({name: t.to(torch.long) for name, t in tensors.items()}),
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"", "cut": lambda data: data[:-9], "a cut header": lambda data: data[:40],
    "zeros": lambda data: bytes(len(data)), "a pickle": lambda data: b"\x80\x04\x95" + data,
    "a long header": lambda data: (2**62).to_bytes(8, "little") + data[8:],
    "a deep header": lambda data: len(DEEP).to_bytes(8, "little") + DEEP.encode(),
}  # fmt: skip
"""What happens to the bytes of a file: of weights, of states, of a backbone."""
JSON: dict[str, str] = {
    "nothing": "", "list": "[]", "null": "null", "deep": DEEP, "empty": "{}", "unknown kind": '{"model_type": "what"}',
    "number": '{"model_type": 3}', "no decoder": '{"model_type": "t5"}',
    "negative": '{"model_type": "llama", "hidden_size": -8}', "text": '{"model_type": "llama", "hidden_size": "x"}',
    "code": '{"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}',
}  # fmt: skip
"""Texts in place of the backbone's configuration."""
TOKENIZERS: dict[str, dict[str, str]] = {
    "cut": {"tokenizer.json": '{"version": "1.0", '}, "empty": {"tokenizer.json": "{}"},
    "deep": {"tokenizer.json": DEEP},
    "a list": {"tokenizer_config.json": "[]"}, "no JSON": {"tokenizer_config.json": "w1"},
    "code": {"tokenizer_config.json": '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", null]}}'},
}  # fmt: skip

STORES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda index: b"", "cut": lambda index: index[: len(index) // 2], "zeros": lambda index: bytes(len(index)),
    "text": lambda index: b"w1 w2", "version 9": lambda index: index[:63] + b"\x09" + index[64:],
}  # fmt: skip
"""What happens to the index of a memory store; the version is the last of four bytes from byte 60."""

# ---------------------------------------------------------------- rows and configurations of training

ROWS: dict[str, str] = {
    "empty": "", "blank": "\n\n", "no JSON": "w1 w2", "cut": '{"context": "w1', "list": "[]", "number": "3",
    "deep": DEEP, "deep value": '{"context": ' + DEEP, "no context": '{"query": "w1", "target": "w2"}',
    "no query": '{"context": "w1"}', "context null": json.dumps(ROW | {"context": None}),
    "context number": json.dumps(ROW | {"context": 3}), "context empty": json.dumps(ROW | {"context": " "}),
    "target empty": json.dumps(ROW | {"target": ""}), "target list": json.dumps(ROW | {"target": ["w1"]}),
    "query number": json.dumps(ROW | {"query": 1.5}), "both": json.dumps(ROW | {"queries": ["w1"]}),
    "unequal": '{"context": "w1", "queries": ["w1", "w2"], "targets": ["w1"]}',
    "texts for lists": '{"context": "w1", "queries": "w1", "targets": "w2"}',
    "none asked": '{"context": "w1", "queries": [], "targets": []}', "answers": json.dumps(ROW | {"answers": 3}),
    "messages": json.dumps(ROW | {"query": [{"role": "user"}]}), "half": json.dumps(ROW | {"context": "w1 \ud800"}),
    "second line": json.dumps(ROW) + "\n{", "long": json.dumps(ROW | {"context": tiny_text(200)}),
    "long query": json.dumps(ROW | {"query": tiny_text(200)}),
}  # fmt: skip
NINE = ", ".join(["*a{0}"] * 9)
YAML: dict[str, str] = {
    "empty": "", "list": "[1, 2]", "text": "w1", "no YAML": "memory: {", "tab": "memory:\n\t- 1", "deep": "a: " + DEEP,
    "date": "backbone: 2026-01-01", "object": "backbone: !!python/object/apply:os.system [true]",
    "bytes": "backbone: !!binary aGVsbG8=", "set": "backbone: !!set {a, b}", "key": "1: 2", "keys": "? [a]\n: 2",
    "aliases": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{NINE.format(i - 1)}]\n" for i in range(1, 20)),
    "merged": "m0: &m0 {x: 1}\n" + "".join(
        f"m{i}: &m{i} {{<<: [{NINE.format(i - 1).replace('a', 'm')}]}}\n" for i in range(1, 20)
    ),
    "itself": "memory: &m {lora_config: *m}", "no anchor": "memory: *m", "two": "a: 1\n---\nb: 2", "control": "a: \x01",
    "large": "a: [" + "1, " * 100_000 + "]", "number": "backbone: !!int x", "unknown": "colour: red",
}  # fmt: skip
SETTINGS = [
    "colour=red", "=3", "memory", "memory=3", "memory=[1]", "training=null", "training=x", "backbone=3", "backbone=[a]",
    "eval_rows=nowhere", "eval_rows=3", "eval_rows=.", "memory={", "memory.x.y=1", "memory.0=1",
    "memory.num_memory_tokens=0", "memory.num_memory_tokens=x", "memory.num_memory_tokens=1.5",
    "memory.num_memory_tokens=1000", "memory.write_steps=-1", "memory.write_lr=.nan", "memory.write_lr=-.inf",
    "memory.write_lr=0", "memory.learn_write_lr=yes", "memory.start=here", "memory.meta_gradient=best",
    "memory.write_clip_norm=-1", "memory.query_format=x", "memory.lora_config=3", "memory.lora_config.r=0",
    "memory.lora_config.r=x", "memory.lora_config.rank=3", "memory.lora_config.target_modules=[no_such]",
    "memory.lora_config.target_modules=(", "memory.lora_config.target_modules=3", "memory.lora_config.bias=all",
    "memory.lora_config.lora_dropout=2", "memory.lora_config.rank_pattern={(: 1}", "memory.reconstruction_weight=.inf",
    "training.step=1", "training.output_dir=x", "training.write_steps=[]", "training.write_steps=[-1]",
    "training.write_steps=x", "training.warmup_steps=-5", "training.warmup_steps=x", "training.warmup_steps=.nan",
    "training.max_minutes=.nan", "training.max_minutes=-1", "training.max_minutes=0", "training.max_minutes=x",
    "training.max_minutes=.inf", "training.learning_rate=.nan", "training.learning_rate=-1", "training.learning_rate=x",
    "training.max_steps=x", "training.max_steps=1.5", "training.num_train_epochs=-1", "training.num_train_epochs=.nan",
    "training.per_device_train_batch_size=0", "training.per_device_train_batch_size=-3",
    "training.gradient_accumulation_steps=0", "training.weight_decay=-1", "training.max_grad_norm=.nan",
    "training.adam_beta1=2", "training.adam_epsilon=-1", "training.optim=best", "training.lr_scheduler_type=best",
    "training.report_to=nobody", "training.report_to=dvclive", "training.report_to=[none, x]", "training.report_to=3",
    "training.logging_steps=0", "training.logging_steps=x", "training.save_strategy=best",
    "training.eval_strategy=steps", "training.seed=-1", "training.seed=x", "training.bf16=perhaps",
    "training.decay_share=2", "training.muon_lr_factor=-1", "training.tokens_per_batch=0",
    "training.label_smoothing_factor=0.1", "training.dataloader_num_workers=-1",
    "training.context_buckets=[0]", "training.queries_per_context=0", "training.generation_max_new_tokens=0",
    "training.accelerator_config={split: 1}", "training.accelerator_config=x", "training.bf16=true\ntraining.fp16=true",
    "training.resume_from_checkpoint=3", "training.load_best_model_at_end=true",
]  # fmt: skip

# ---------------------------------------------------------------- options and places

DEVICES = ["mps", "cuda:99", "meta", "xla", "xpu", "hpu", "mkldnn", "vulkan", "foo", "", "1", "cuda:-1", "CPU"]
NUMBERS = ["-1", "x", "1.5", "nan", "inf", "", "--", "1e3", "0x10"]
PLACES = [
    "nowhere/x", "folder", "/dev/null", "pipe", "notes.txt", "link", "rows.jsonl/x", "x" * 300, "loop", "/proc/x",
    "checkpoint/adapter_config.json", "rows.jsonl", "",
]  # fmt: skip
"""Places that nothing may be written to."""
OPTIONS = ["--colour", "--checkpoint", "--steps=", "-x", "--device"]


def cases() -> Iterator[list[str]]:
    """Every command line, without the program's name."""
    write = ["write", "notes.txt", "--output", "new", "--checkpoint", "checkpoint"]
    ask = ["ask", "w1", "--text", "notes.txt", "--checkpoint", "checkpoint"]
    kept = ["ask", "w1", "--checkpoint", "checkpoint"]
    store = ["write", "notes.txt", "--store", "new", "--checkpoint", "checkpoint", "--segment-tokens", "9"]
    stored = ["ask", "w1", "--store", "store", "--checkpoint", "checkpoint"]
    demo = ["demo", "--task", "recite", "--text", "story.txt", "--backbone", "backbone", "--steps", "1"]
    pairs = ["demo", "--task", "kv", "--pairs", "2"]
    train = ["train", "rows.jsonl", "--output", "new", "--backbone", "backbone", "--config", "config.yaml"]
    yield from (["--colour"], ["what"], ["write"], ["ask"], ["train"], ["--debug"], ["demo", "x"])
    for text in NO_TEXTS:
        yield from (["write", text, *write[2:]], ["write", "notes.txt", text, *write[2:]], [*ask, "--text", text])
        yield [*demo, "--text", text]
        if text != "long":  # which is split into segments
            yield from (["write", text, *store[2:]], ["write", f"{text}*.jsonl", *store[2:]])
    for checkpoint in (*_checkpoints(), "missing", "notes.txt", "folder", "backbone", "pipe", ""):
        yield from ([*command, "--checkpoint", checkpoint] for command in (write, ask, pairs))
    for i in range(FLIPS):
        yield from ([*command, "--checkpoint", f"flips/{i}"] for command in (write, ask, pairs))
    for i in range(CUTS):
        yield from ([*command, "--backbone", f"cuts/{i}"] for command in (demo, train))
    for backbone in (*_backbones(), "missing", "folder", "notes.txt", "checkpoint", "", "package:os/x.gguf", "a/b/c"):
        yield from ([*command, "--backbone", backbone] for command in (demo, train))
    for device in DEVICES:
        yield from ([*command, "--device", device] for command in (write, ask, train))
    for option in OPTIONS:
        yield from ([*command, option] for command in (write, ask, demo, train))
    for number in NUMBERS:
        yield from ([*command, "--steps", number] for command in (write, ask, demo, pairs))
        yield from ([*write, "--max-tokens", number], [*ask, "--max-new-tokens", number], [*pairs, "--pairs", number])
        yield [*demo, "--memory-tokens", number]
        yield from ([*store, "--segment-tokens", number], [*stored, "--k", number])
    yield from ([*demo, "--seed", number] for number in ("x", "1.5", "", str(2**70), str(-(2**70))))
    yield from ([*pairs, "--pairs", number] for number in ("0", "1000", "100000"))
    yield from ([*write, "--max-tokens", "0"], [*ask, "--max-new-tokens", "0"], [*demo, "--memory-tokens", "0"])
    yield from ([*demo, "--memory-tokens", "100"], ["demo", "--task", "what"], [*pairs, "--what"], [*kept, "w2"], kept)
    for place in PLACES:
        yield from ([*write, "--output", place], [*ask, "--state", place])
        if place not in ("nowhere/x", "folder", ""):
            yield [*train, "--output", place]
    yield from (
        [*write, "--force", "--output", place] for place in ("notes.txt", "link", "/dev/null", "pipe", "folder")
    )
    yield from ([*kept, "--state", state] for state in _states())
    yield from ([*kept, "--state", state] for state in ("folder", "pipe", "link to zero", "sparse", "bomb.gz", "loop"))
    for name in STORES:
        yield from ([*command, "--store", f"stores/{name}"] for command in (store, stored))
        yield from (["store", command, f"stores/{name}"] for command in ("list", "stats", "verify", "gc"))
    for name in ("nowhere", "folder", "notes.txt", "pipe", "loop", "x" * 300, ""):
        yield from ([*stored, "--store", name], *(["store", command, name] for command in ("list", "gc", "rebuild")))
    yield from (["store", command, "store", "nowhere"] for command in ("show", "forget", "list"))
    yield from ([*store, "--store", name] for name in (*PLACES[2:], "checkpoint") if name)
    yield from ([*stored, *more] for more in (["--text", "notes.txt"], ["--state", "new"], ["--store", "stores/cut"]))
    for question in ("", "notes.txt", "./notes.txt", tiny_text(200), "w1 \udc80"):
        yield ["ask", question, *ask[2:]]
    yield from (["train", f"rows {rows}", *train[2:]] for rows in ROWS)
    yield from ([*train, "--eval", f"rows {rows}"] for rows in ROWS)
    yield from (["train", text, *train[2:]] for text in NO_TEXTS)
    yield from ([*train, "--config", f"{name}.yaml"] for name in (*YAML, "missing"))
    yield from ([*train, "--config", text] for text in ("binary", "utf16", "folder", "pipe", "sparse", "bomb.gz"))
    for setting in SETTINGS:
        command = train[:4] + train[6:] if setting.startswith("backbone") else train
        yield [*command, *(part for one in setting.split("\n") for part in ("--set", one))]


# ---------------------------------------------------------------- the files


def _checkpoints() -> list[str]:
    """The names of damaged checkpoints."""
    names = [*CONFIGS, *map(str, FIELDS), *map(str, LORA), *TENSORS, *(f"weights {how}" for how in BYTES), "no weights"]
    return [
        *(f"checkpoints/{i}" for i in range(len(names))), *(f"tokenizers/{name}" for name in TOKENIZERS),
        *(f"of/{name}" for name in _backbones()),
    ]  # fmt: skip


def _backbones() -> list[str]:
    """The names of damaged backbones."""
    names = [*JSON, *(f"weights {how}" for how in BYTES), "no weights", "no tokenizer", *(f"t {n}" for n in TOKENIZERS)]
    return [f"backbones/{name}" for name in names]


def _states() -> list[str]:
    return [f"states/{how}" for how in (*BYTES, "a bit", "another model", "another width", "version 9", "not finite")]


def lay_out(folder: Path) -> None:
    """Make the good files and the damaged ones, in the current directory, which is `folder`."""
    tiny().save_pretrained("backbone")
    tiny_tokenizer().save_pretrained("backbone")
    model, tokenizer = load_backbone("./backbone")
    lora = {"r": 2, "target_modules": ["q_proj"]}
    config = GradMemConfig(num_memory_tokens=3, write_steps=1, write_lr=0.3, query_format="chat", lora_config=lora)
    save_checkpoint(get_peft_model(model, config), tokenizer, "checkpoint")
    _flip_and_cut(folder)
    (folder / "checkpoint" / SUMS).unlink()  # an attacker would also change the digest
    files: dict[str, bytes | str] = {"notes.txt": tiny_text(12), "story.txt": tiny_text(48), **TEXTS}
    files |= {"rows.jsonl": json.dumps(ROW)} | {f"rows {name}": text for name, text in ROWS.items()}
    training = "training: {max_steps: 1, per_device_train_batch_size: 1}"
    files |= {"config.yaml": f"memory: {{num_memory_tokens: 2}}\n{training}"}
    files |= {f"{name}.yaml": text for name, text in YAML.items()}
    task = "{name: kv_retrieval, pairs: 2, stages: [{steps: 1, mix: [{max_pairs: 2, contexts: 2, queries: 1}]}]}"
    files |= {"recipe.yaml": f"tasks: [{task}]\nbackbone: {{layers: 1, width: 8, heads: 2}}\n{training}"}
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, text in CONFIGS.items():
        (folder / "recipes" / name).mkdir(parents=True)
        (folder / "recipes" / name / "recipe.json").write_text(text)
    (folder / "folder").mkdir()
    os.mkfifo("pipe")
    for name, target in (("link to zero", "/dev/zero"), ("loop", "loop"), ("link", "notes.txt")):
        (folder / name).symlink_to(target)
    (folder / "sparse").touch()
    os.truncate("sparse", 40 * 2**30)
    with gzip.open("bomb.gz", "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(bytes(2**20))
    _damage_checkpoints(folder)
    _damage_backbones(folder)
    _damage_states(folder)


def _flip_and_cut(folder: Path) -> None:
    dice = random.Random(0)
    for name, source, count in (("flips", "checkpoint", FLIPS), ("cuts", "backbone", CUTS)):
        (folder / name).mkdir()
        for i in range(count):
            needed = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", CONFIG, WEIGHTS)
            copy = Path(shutil.copytree(source, folder / name / str(i)))
            files = [file for file in sorted(copy.rglob("*")) if file.name in needed]
            file = dice.choice(files)
            data = bytearray(file.read_bytes())
            place = dice.randrange(len(data) - 2)
            if name == "cuts":
                del data[place:]
            else:
                data[place] ^= 1 << dice.randrange(8)
            file.write_bytes(data)


def _damage_checkpoints(folder: Path) -> None:
    good = json.loads((folder / "checkpoint" / CONFIG).read_text())
    (folder / "checkpoints").mkdir()
    texts = [*CONFIGS.values(), *(json.dumps(good | fields) for fields in FIELDS)]
    texts += [json.dumps(good | {"lora_config": good["lora_config"] | fields}) for fields in LORA]
    for text in texts:
        (_copy("checkpoint", "checkpoints") / CONFIG).write_text(text)
    for change in TENSORS.values():
        file = _copy("checkpoint", "checkpoints") / WEIGHTS
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    for damage in BYTES.values():
        file = _copy("checkpoint", "checkpoints") / WEIGHTS
        file.write_bytes(damage(file.read_bytes()))
    (_copy("checkpoint", "checkpoints") / WEIGHTS).unlink()
    (folder / "tokenizers").mkdir()
    for name, changed in TOKENIZERS.items():
        _rewrite(shutil.copytree("checkpoint", folder / "tokenizers" / name), changed)
    (folder / "of").mkdir()
    for name in _backbones():
        copy = Path(shutil.copytree("checkpoint", folder / "of" / name))
        if "tokenizer" in name or "t " in name:  # otherwise its own would do
            for file in copy.glob("*token*"):
                file.unlink()
        (copy / CONFIG).write_text(json.dumps(good | {"base_model_name_or_path": f"./{name}"}))


def _damage_backbones(folder: Path) -> None:
    (folder / "backbones").mkdir()

    def copy(name: str) -> Path:
        return Path(shutil.copytree("backbone", folder / "backbones" / name))

    for name, text in JSON.items():
        (copy(name) / "config.json").write_text(text)
    for how, damage in BYTES.items():
        file = copy(f"weights {how}") / "model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
    (copy("no weights") / "model.safetensors").unlink()
    for file in copy("no tokenizer").glob("*token*"):
        file.unlink()
    for name, changed in TOKENIZERS.items():
        _rewrite(copy(f"t {name}"), changed)


def _damage_states(folder: Path) -> None:
    pipeline = GradMemPipeline(*load_checkpoint("checkpoint"))
    state = pipeline.write(["w1 w2 w3"])
    data = state.to_bytes()
    (folder / "states").mkdir()
    kinds = {how: damage(data) for how, damage in BYTES.items()}
    kinds["a bit"] = data[:-9] + bytes([data[-9] ^ 64]) + data[-8:]
    kinds["another model"] = replace(state, fingerprint="of another").to_bytes()
    kinds["another width"] = replace(state, vectors=state.vectors[..., :8]).to_bytes()
    kinds["version 9"] = data.replace(b'\\"version\\": 2', b'\\"version\\": 9')
    kinds["not finite"] = data[:-16] + b"\xff" * 16
    for name, content in kinds.items():
        (folder / "states" / name).write_bytes(content)
    MemoryStore("store").add(pipeline, "w1 w2 w3", sources="notes.txt")
    (folder / "stores").mkdir()
    for name, damage in STORES.items():
        file = Path(shutil.copytree("store", folder / "stores" / name)) / "index.sqlite"
        file.write_bytes(damage(file.read_bytes()))


def _copy(source: str, into: str) -> Path:
    """A copy under the next number."""
    return Path(shutil.copytree(source, Path(into) / str(len(os.listdir(into)))))


def _rewrite(folder: Path, changed: dict[str, str]) -> None:
    for file, text in changed.items():
        (folder / file).write_text(text)
