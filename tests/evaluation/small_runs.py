"""Runs on tiny models, with rows in files."""

import gzip
import json

from tiny import rows, tiny, tiny_text, tiny_tokenizer

from evaluation.config import RunConfig

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
METHODS = (
    {"name": "gradmem"}, {"name": "forward_memory"}, {"name": "mean_pooling"}, {"name": "truncated_text"},
    {"name": "truncated_text", "tokens": 0}, {"name": "full_context"},
)  # fmt: skip


def write_folder(directory):
    """A backbone and two sources of rows, "short" and "long"."""
    tiny().save_pretrained(directory / "backbone")
    tiny_tokenizer().save_pretrained(directory / "backbone")
    for name, made in (("short", rows(6, 9)), ("long", rows(4, 14, seed=50))):
        (directory / name).mkdir()
        lines = [
            {"context": row["context"], "query": query, "target": target, "answers": answers}
            for row in made
            for query, target, answers in zip(row["queries"], row["targets"], row["answers"], strict=True)
        ]
        for split in ("train", "test"):
            (directory / name / f"{split}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return directory


def write_articles(directory):
    """Two articles of four paragraphs of ten words, with a question on each."""
    lines = []
    for article in range(2):
        paragraphs = [tiny_text(10, seed=10 * article + i) for i in range(4)]
        asked = [
            {"query": " ".join(words[2:6]), "answers": [words[0]], "para": i}
            for i, words in enumerate(paragraph.split() for paragraph in paragraphs)
        ]
        lines.append({"doc_id": str(article), "context": "\n\n".join(paragraphs), "questions": asked})
    with gzip.open(directory / "squad_articles_test.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(line) for line in lines))


def qa_fields(folder, method=None, **changes):
    """The fields of a run on the rows of `write_folder`."""
    method = method or {"name": "gradmem"}
    memory = {"num_memory_tokens": 3, "lora_config": LORA, "query_format": "chat"}
    if method["name"] == "gradmem":
        memory |= {"write_lr": 0.3, "meta_gradient": "finite_difference", "reconstruction_weight": 0.2}
    fields = {
        "backbone": str(folder / "backbone"), "method": method, "memory": memory,
        "tasks": [{"name": "passages", "source": str(folder / "short"), "share": 3},
                  {"name": "passages", "source": str(folder / "long")}],
        "batches": {"buckets": [10, 16], "tokens": 64, "side_by_side": [1, 2]},
        "training": {"max_steps": 6, "write_steps": [1, 2], "learning_rate": 5e-3, "warmup_steps": 1,
                     "logging_steps": 2, "save_steps": 3, "disable_tqdm": True},
        "evaluation": {"write_steps": [1, 2]},
    }  # fmt: skip
    return fields | changes


def qa_config(folder, method=None, **changes):
    """The run itself."""
    return RunConfig.of(qa_fields(folder, method, **changes))


def kv_fields(method=None, **changes):
    """The fields of a run on key-value retrieval."""
    method = method or {"name": "gradmem"}
    memory = {"num_memory_tokens": 4}
    if method["name"] == "gradmem":
        memory |= {"write_head": True, "reconstruction_weight": 0.2, "meta_gradient": "finite_difference"}
    stages = [
        {"steps": 4, "mix": [{"max_pairs": 2, "contexts": 8, "queries": 2, "write_steps": [1, 2]}]},
        {"steps": 4, "mix": [{"max_pairs": 4, "min_pairs": 2, "contexts": 4, "queries": 2, "share": 3},
                             {"max_pairs": 2, "contexts": 4, "queries": 2}]},
    ]  # fmt: skip
    fields = {
        "method": method, "backbone": {"layers": 1, "width": 32, "heads": 2}, "memory": memory,
        "tasks": [{"name": "kv_retrieval", "stages": stages}],
        "training": {"warmup_steps": 2, "learning_rate": 1e-3, "save_steps": 4, "disable_tqdm": True},
        "evaluation": {"tasks": [{"name": "kv_retrieval", "pairs": 4, "contexts": 4}]},
    }  # fmt: skip
    return fields | changes


def kv_config(method=None, **changes):
    """The run itself."""
    return RunConfig.of(kv_fields(method, **changes))
