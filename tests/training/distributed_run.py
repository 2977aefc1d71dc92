"""What each of two processes runs for test_distributed.py: `distributed_run.py META_GRADIENT,... FOLDER`."""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from test_trainer import LORA, Gradients, Poison, logs, make, rows, trainer, weights
from tiny import tiny, tiny_tokenizer
from transformers import TrainerCallback
from typer.testing import CliRunner

from gradmem_adapter import save_checkpoint
from gradmem_adapter.backbones import load_backbone
from gradmem_adapter.cli import app
from gradmem_adapter.cli.processes import meet
from gradmem_adapter.training import Batches, GradMemCollator, TrainingDiverged, callbacks
from gradmem_adapter.training.callbacks import StopOnSignal
from gradmem_adapter.training.sharding import whole_weights

SHARED = {"ddp_backend": "gloo"} if not torch.cuda.is_available() else {"ddp_backend": "nccl", "use_cpu": False}
"""The options of a trainer that shares its work; CUDA_VISIBLE_DEVICES hides GPUs that are not to be used."""
EVALUATED = ("eval_loss", "eval_target_loss", "eval_exact_match", "eval_f1", "eval_memory_norm")
LOGGED = (
    "loss",
    "target_loss",
    "first_write_loss",
    "last_write_loss",
    "memory_norm",
    "memory_grad_norm",
    "grad_norm",
)


NOT_SHARDED = (
    {"fsdp_config": {"version": 1, "sync_module_states": False}},
    {"fsdp_config": {"activation_checkpointing": True}},
    {"fsdp_config": {"cpu_offload": True}},
    {"muon_lr_factor": 1.0},
    {"cuda_graphs": True},
)


def score(answer, references):
    """Tells answers of an untrained model apart, where exact match would be 0 for all."""
    return {"exact_match": float(len(answer.split())), "f1": float(len(set(answer.split())))}


def train(output, processes, meta_gradient, **options):
    """Two optimizer steps on the same rows, however many processes share them; then an uneven evaluation. And the
    weights of a run resumed from the checkpoint after the first step, once for all meta-gradients."""

    answered = []

    def runner():
        seen = Gradients()
        model = make(
            meta_gradient=meta_gradient, lora_config=LORA, learn_write_lr="scalar", write_head=True,
            memory_projection="shared", train_backbone=meta_gradient == "exact",
        )  # fmt: skip
        run = trainer(
            model, output, rows(8, queries=3), rows(5, 30, queries=3), callbacks=[seen], score=score,
            compute_metrics=lambda found: answered.append(found) or {},
            per_device_train_batch_size=2 // processes, gradient_accumulation_steps=2, max_grad_norm=0,
            train_sampling_strategy="sequential", write_steps=[1, 2, 3], generation_max_new_tokens=6,
            save_strategy="steps", save_steps=1, seed=1, **(SHARED if processes > 1 else {}), **options,
        )  # fmt: skip
        return run, seen.steps

    run, gradients = runner()
    run.train()
    metrics = run.evaluate()
    again = run
    if meta_gradient == "exact":
        again, _ = runner()
        again.train(resume_from_checkpoint=str(output / "checkpoint-1"))
    with whole_weights(run.model), whole_weights(again.model):
        return {
            "gradients": gradients,
            "weights": weights(run.model),
            "trained_length": run.config.trained_length,
            "resumed": weights(again.model),
            "logs": {name: logs(run, name) for name in (*LOGGED, "write_steps")},
            "metrics": {name: metrics[name] for name in EVALUATED},
            "answers": [torch.tensor(found) for found in (answered[0].predictions, answered[0].label_ids)],
        }


def sharded_on_cpus():
    """Accelerate allows FSDP2 on GPUs only, although PyTorch also supports CPUs."""
    made = AcceleratorState.__init__

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = __init__


def refused(output, **options):
    """The error message of a trainer that cannot be made."""
    try:
        trainer(make(), output, rows(2), fsdp=True, **SHARED, **options)
    except NotImplementedError as error:
        return str(error)


def train_ready(output, processes):
    """Ready batches through the path of CUDA graphs, with a teacher; each of two processes has half a batch."""
    seen = Gradients()
    run = trainer(
        make(meta_gradient="first_order", lora_config=LORA, learn_write_lr="scalar"), output, Halves(processes),
        callbacks=[seen], teacher=tiny(seed=3), max_steps=3, max_grad_norm=0, cuda_graphs=True, write_steps=[1, 2],
        gradient_accumulation_steps=2, **(SHARED if processes > 1 else {}),
    )  # fmt: skip
    run.train()
    return {
        "gradients": seen.steps,
        "weights": weights(run.model),
        "logs": {name: logs(run, name) for name in (*LOGGED, "distillation_loss", "write_steps")},
    }


class Halves(Batches):
    """Each process gets its part of the same rows."""

    def __init__(self, processes):
        super().__init__()
        self.processes = processes

    def batch(self, step, device):
        batch = GradMemCollator(tiny_tokenizer())(rows(4, seed=10 * step))
        part = slice(self.process * 4 // self.processes, (self.process + 1) * 4 // self.processes)
        ready = {name: batch[name][part] for name in batch if not name.startswith("query_") and name != "targets"}
        return ready | {"context_index": torch.arange(4 // self.processes), "max_targets": 4}


def diverge(output):
    """The message in each process when the loss of one of them is not finite."""

    class PoisonOne(Poison):
        def on_step_begin(self, args, state, control, **kwargs):
            if torch.distributed.get_rank() == 1:
                super().on_step_begin(args, state, control, **kwargs)

    run = trainer(make(), output, rows(8), callbacks=[PoisonOne(1)], max_steps=3, **SHARED)
    try:
        run.train()
    except TrainingDiverged as error:
        return str(error)


def ended(output, **options):
    """The step at which a run ends in each process, and its weights."""
    model = make(meta_gradient="first_order")
    run = trainer(model, output, Halves(2), ddp_backend="gloo", cuda_graphs=True, **options)
    with StopOnSignal() as stop:
        run.add_callback(stop)
        run.train()
    return {"step": run.state.global_step, "seen": stop.seen, "weights": weights(model), "saved": run.has_checkpoint()}


def write(folder):
    """What `gradmem write` prints in each process, and how it ends."""
    arguments = ["write", folder / "texts", "--store", folder / "memory", "--checkpoint", folder / "checkpoint"]
    arguments += ["--segment-tokens", 20, "--max-tokens", 60, "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return {"stdout": result.stdout, "stderr": result.stderr, "exit_code": result.exit_code}


def unpack(folder):
    """The weights that each process loads from a GGUF file, which only process 1 unpacks."""
    os.environ["GRADMEM_CACHE"] = str(folder / "cache")
    sys.path.append(str(folder))
    rank = torch.distributed.get_rank()
    if rank == 0:
        torch.distributed.barrier()
    model, _ = load_backbone("package:holds_a_gguf/tiny.gguf")
    if rank == 1:
        torch.distributed.barrier()
    return model.state_dict()


class Interrupt(TrainerCallback):
    """Sends a signal to process 0 only."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and torch.distributed.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def on_cpus(folder, meta_gradients):
    """Everything, shared by processes on the CPU."""
    results = {"written": write(folder)}
    results |= {name: train(folder / name, 2, name) for name in meta_gradients}
    results["ready"] = train_ready(folder / "ready", 2)
    results["unpacked"] = unpack(folder)
    save_checkpoint(make(train_backbone=True), tiny_tokenizer(), folder / f"of process {torch.distributed.get_rank()}")
    results["interrupted"] = ended(folder / "interrupted", callbacks=[Interrupt()], max_steps=99)
    if torch.distributed.get_rank():  # a clock that runs differently
        callbacks.time = SimpleNamespace(monotonic=lambda: 1000 * time.monotonic())
    results["clock"] = ended(folder / "clock", max_minutes=1.5 / 60, max_steps=-1, logging_steps=100)
    results["diverged"] = diverge(folder / "diverged")
    sharded_on_cpus()  # last: from now on every trainer would be sharded
    for name in ("exact", "finite_difference"):
        results[f"sharded {name}"] = train(folder / f"sharded {name}", 2, name, fsdp=True)
    results["refused"] = [refused(folder / "refused", **options) for options in NOT_SHARDED]
    return results


def on_gpus(folder, meta_gradients):
    """What may depend on the device."""
    results = {name: train(folder / name, 2, name) for name in meta_gradients}
    results["ready"] = train_ready(folder / "ready", 2)
    return results | {
        f"sharded {name}": train(folder / f"sharded {name}", 2, name, fsdp=True) for name in meta_gradients
    }


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    torch.set_num_threads(1)
    with meet(cpu=not torch.cuda.is_available()) as processes:
        results = (on_gpus if torch.cuda.is_available() else on_cpus)(folder, sys.argv[1].split(","))
    torch.save(results, folder / f"results-{processes.process_index}.pt")
