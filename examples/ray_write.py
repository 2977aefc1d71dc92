"""Write many texts on a Ray cluster: each worker holds the model, and this process stores what they wrote.

    pip install "ray[data]"
    python examples/ray_write.py rows.jsonl --store memory [--workers 2] [--gpus 1] [--checkpoint PATH]

A row is a line of JSON: {"source": "...", "text": "..."}. An interrupted run continues with the sources that are not
stored yet. Only this process writes the store: several machines must not write its SQLite index.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ray

from gradmem_adapter import GradMemPipeline, MemoryState, WriteOptions, load_checkpoint
from gradmem_adapter.store import Entry, MemoryStore, state_key, write_identity

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "smollm2-135m-qa"


class Writer:
    """A worker."""

    def __init__(self, checkpoint: str, segment_tokens: int | None, device: str) -> None:
        self.pipeline = GradMemPipeline(*load_checkpoint(checkpoint, device=device))
        self.segment_tokens = segment_tokens
        self.identity = write_identity(self.pipeline.model.active_peft_config, WriteOptions())

    def __call__(self, documents: dict[str, Any]) -> dict[str, Any]:
        """Turn rows of documents into rows of their written segments."""
        sources, segments = [], []
        for source, text in zip(documents["source"], documents["text"], strict=True):
            found = list(self.pipeline.segments(text, self.segment_tokens))
            segments += found
            sources += [source] * len(found)
        states = self.pipeline.write_many([segment.text for segment in segments], progress=False)
        fingerprint = self.pipeline.model.fingerprint()
        return {
            "key": [state_key(segment.text, fingerprint, self.identity) for segment in segments],
            "source": sources,
            "start": [segment.start for segment in segments],
            "end": [segment.end for segment in segments],
            "text": [segment.text for segment in segments],
            "options": [json.dumps(self.identity)] * len(segments),
            "state": [state.to_bytes() for state in states],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("--store", required=True)
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="for load_checkpoint, on every machine")
    parser.add_argument("--segment-tokens", type=int, help="default: two for each of the adapter's vectors")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs per worker")
    args = parser.parse_args()

    store = MemoryStore(args.store)
    known = {entry.source for entry in store.entries()} if store.exists() else set()
    documents = ray.data.read_json(args.rows, lines=True).filter(lambda row: row["source"] not in known)
    written = documents.map_batches(
        Writer,
        fn_constructor_args=(args.checkpoint, args.segment_tokens, "cuda" if args.gpus else "cpu"),
        batch_size=32,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=args.workers),  # reading needs a core, too
        num_gpus=args.gpus,
    )
    for rows in written.iter_batches(batch_size=None, batch_format="pandas"):
        states = MemoryState.stack([MemoryState.from_bytes(state) for state in rows.pop("state")])
        entries = [Entry(**row | {"options": json.loads(row["options"])}) for row in rows.to_dict("records")]
        store.put(states, entries, dtype=store.dtype)
    stored = list(store.entries())
    print(f"{len({entry.source for entry in stored})} sources in {len(stored)} segments")


if __name__ == "__main__":
    main()
