"""The names that the package promises, where it promises them."""

import inspect
import re

import gradmem_adapter
from gradmem_adapter import training

TOP_LEVEL = (
    "Fidelity", "GradMemConfig", "GradMemModel", "GradMemOutput", "GradMemPeftModel", "GradMemPipeline", "MemoryState",
    "MemoryStateError", "WriteOptions", "WriteProgress", "compat", "get_peft_model", "load_backbone", "load_checkpoint",
    "save_checkpoint",
)  # fmt: skip
METHODS = (
    "write", "write_many", "generate", "forward", "reconstruct", "fidelity", "prefix_embeddings", "query_prefix",
    "fingerprint",
)  # fmt: skip


def test_promised_names_exist():
    for name in TOP_LEVEL:
        assert name in gradmem_adapter.__all__
        assert hasattr(gradmem_adapter, name)
    for name in METHODS:
        assert hasattr(gradmem_adapter.GradMemModel, name)
    for name in ("GradMemTrainer", "GradMemCollator"):
        assert hasattr(training, name)
    for name in ("load_authors_checkpoint", "authors_names"):
        assert hasattr(gradmem_adapter.compat, name)


def test_public_methods_explain_their_arguments():
    """Every argument that somebody may pass has a line in the docstring's `Args:`."""
    model, pipeline = gradmem_adapter.GradMemModel, gradmem_adapter.GradMemPipeline
    functions = [getattr(model, name) for name in METHODS]
    functions += [gradmem_adapter.load_checkpoint, gradmem_adapter.save_checkpoint]
    functions += [function for name, function in inspect.getmembers(pipeline, inspect.isfunction) if name[0] != "_"]
    functions += [training.read_rows, training.score_answer, training.Batches.batch, training.GradMemCollator.__call__]
    classes = [gradmem_adapter.WriteOptions, gradmem_adapter.MemoryState]
    classes += [training.GradMemTrainer, training.GradMemCollator, training.RowBatches]
    for function in functions + classes:
        for name in inspect.signature(function).parameters:
            if name != "self":
                assert re.search(rf"\b{name}\b", function.__doc__ or ""), (function.__qualname__, name)


def test_training_arguments_are_explained():
    """Only our own; Transformers explains its own."""
    arguments = training.GradMemTrainingArguments
    for name in vars(arguments)["__annotations__"]:
        assert re.search(rf"^    {name} \(`", inspect.getdoc(arguments), re.MULTILINE), name
