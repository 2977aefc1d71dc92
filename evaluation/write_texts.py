"""Let a model write texts on which to train WRITE: each continues some words of given texts.

    python -m evaluation.write_texts data/fairytaleqa data/texts/train.txt.gz --count 20000

A small set of texts would be learned by heart. A language model can write any number of different texts, and it knows
how to read them. There is one text per line.
"""

from __future__ import annotations

import argparse
import gzip
import random
from pathlib import Path
from typing import Any

import torch

from evaluation.tasks import PlainText
from gradmem_adapter import SMOLLM2, load_backbone
from gradmem_adapter.utils.files import check_writable, replacing
from gradmem_adapter.utils.wording import counted

OPENING = 12
"""Words."""


def openings(sources: list[str], count: int, draw: random.Random) -> list[str]:
    """The openings of the texts: some words from random positions in random passages."""
    passages = [row["context"].split() for source in sources for row in PlainText(source=source).rows("train")]
    found = []
    for words in draw.choices(passages, [len(words) for words in passages], k=count):
        start = draw.randrange(max(1, len(words) - OPENING))
        found.append(" ".join(words[start : start + OPENING]))
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="directories of texts or questions, for the openings")
    parser.add_argument("output", type=Path, help="a .txt.gz file")
    parser.add_argument("--backbone", default=SMOLLM2)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=300, help="the most new tokens in a text")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check_writable(args.output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone: Any
    backbone, tokenizer = load_backbone(args.backbone)
    backbone.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = openings(args.sources, args.count, random.Random(args.seed))
    torch.manual_seed(args.seed)
    with replacing(args.output) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as file:
        for first in range(0, len(prompts), args.batch):
            inputs = tokenizer(prompts[first : first + args.batch], return_tensors="pt", padding=True).to(device)
            written = backbone.generate(
                **inputs, do_sample=True, temperature=args.temperature, top_k=args.top_k, max_new_tokens=args.tokens
            )
            for text in tokenizer.batch_decode(written, skip_special_tokens=True):
                file.write(" ".join(text.split()) + "\n")
            print(f"{min(first + args.batch, len(prompts)):,} of {counted(len(prompts), 'text')}", flush=True)


if __name__ == "__main__":
    main()
