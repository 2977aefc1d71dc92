"""Train an adapter on your own rows, starting from the one that ships.

    python examples/train_on_your_rows.py rows.jsonl --output runs/mine [--steps 2000]

A row is a line of JSON: {"context": "...", "queries": ["...", "..."], "targets": ["...", "..."]}. A tenth of the rows
is held out for evaluation. An interrupted run is resumed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from gradmem_adapter import load_checkpoint, save_checkpoint
from gradmem_adapter.training import GradMemTrainer, GradMemTrainingArguments, read_rows

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "smollm2-135m-qa"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="where to start: a checkpoint for load_checkpoint")
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    rows = read_rows(args.rows)
    kept = max(1, len(rows) // 10)

    model, tokenizer = load_checkpoint(args.checkpoint, is_trainable=True)
    arguments = GradMemTrainingArguments(
        str(args.output / "steps"),
        max_steps=args.steps,
        learning_rate=3e-4,
        warmup_steps=args.steps // 20,
        per_device_train_batch_size=8,
        write_steps=[0, 1, 1, 2],  # trained with several numbers of steps, WRITE improves with more
        save_steps=max(1, args.steps // 4),
        save_total_limit=2,
        report_to="none",
    )
    trainer = GradMemTrainer(
        model, arguments, train_dataset=rows[kept:], eval_dataset=rows[:kept], processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output / "steps") if args.output.exists() else None)
    scores = trainer.evaluate()
    print(f"exact match {scores['eval_exact_match']:.1%}, F1 {scores['eval_f1']:.1%} on {kept} rows kept apart")
    save_checkpoint(model, tokenizer, args.output / "checkpoint")


if __name__ == "__main__":
    main()
