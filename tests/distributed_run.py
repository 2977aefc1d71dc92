"""What each of two processes runs for test_distributed.py: `distributed_run.py META_GRADIENT,... FOLDER`."""

import sys
from pathlib import Path

import torch
from test_trainer import LORA, Gradients, Poison, logs, make, rows, trainer, weights

from gradmem_adapter.training import Curriculum, Stage, TrainingDiverged

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


def score(answer, references):
    """Different for different answers, where exact match would be 0 for all of a model that is not trained."""
    return {"exact_match": float(len(answer.split())), "f1": float(len(set(answer.split())))}


def train(output, processes, meta_gradient):
    """Two optimizer steps on the same rows, however many processes share them; then an uneven evaluation."""
    seen = Gradients()
    model = make(meta_gradient=meta_gradient, lora_config=LORA, learn_write_lr=True, write_head=True)
    run = trainer(
        model, output, rows(8, queries=3), rows(5, 30, queries=3), callbacks=[seen], score=score,
        per_device_train_batch_size=2 // processes, gradient_accumulation_steps=2, max_grad_norm=0,
        train_sampling_strategy="sequential", min_write_steps=1, max_write_steps=3, generation_max_new_tokens=6,
        save_strategy="steps", save_steps=2, ddp_backend="gloo" if processes > 1 else None,
    )  # fmt: skip
    run.train()
    metrics = run.evaluate()
    return {
        "gradients": seen.steps,
        "weights": weights(model),
        "logs": {name: logs(run, name) for name in (*LOGGED, "write_steps")},
        "metrics": {name: metrics[name] for name in EVALUATED},
    }


def train_curriculum(output, processes):
    """Over the border of two stages, with checkpointed layers."""
    seen = Gradients()
    curriculum = Curriculum([Stage(rows(3), 1), Stage(rows(5, 20, queries=3), 2, write_steps=(3, 3))])
    run = trainer(
        make(meta_gradient="first_order", lora_config=LORA), output, curriculum, callbacks=[seen], max_steps=-1,
        per_device_train_batch_size=4 // processes, max_grad_norm=0, gradient_checkpointing=True,
        ddp_backend="gloo" if processes > 1 else None,
    )  # fmt: skip
    run.train()
    return {"gradients": seen.steps, "logs": {name: logs(run, name) for name in (*LOGGED, "write_steps", "stage")}}


def diverge(output):
    """The message in each process when the loss of one of them is not finite."""

    class PoisonOne(Poison):
        def on_step_begin(self, args, state, control, **kwargs):
            if torch.distributed.get_rank() == 1:
                super().on_step_begin(args, state, control, **kwargs)

    run = trainer(make(), output, rows(8), callbacks=[PoisonOne(1)], max_steps=3, ddp_backend="gloo")
    try:
        run.train()
    except TrainingDiverged as error:
        return str(error)


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    torch.set_num_threads(1)
    results = {name: train(folder / name, 2, name) for name in sys.argv[1].split(",")}
    results["curriculum"] = train_curriculum(folder / "curriculum", 2)
    results["diverged"] = diverge(folder / "diverged")
    torch.save(results, folder / f"results-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
