"""The writer of questions: what a passage and the questions on it look like to it, and what it makes of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gradmem_adapter.backbones import load_backbone
from gradmem_adapter.write.batching import batches

KINDS = "question_kinds"
"""The field of a writer's configuration that names the kinds of text which it has learned from."""
TOP_P, TEMPERATURE = 0.95, 0.9
"""Of questions, which are sampled."""
PAIRS_TOKENS, ANSWER_TOKENS = 150, 24
"""New tokens at most: of all questions on a passage with their answers, and of one answer."""
QUESTION_WORDS = range(3, 41)
_PAIR = re.compile(r"Q: (.+)\nA: (.+)\n")


def prompt(kind: str, context: str) -> str:
    """What stands before the questions on a passage."""
    return f"{kind.capitalize()}:\n{context}\n\nQuestions and answers:\n"


def question_line(question: str) -> str:
    """A question, up to where its answer begins."""
    return f"Q: {' '.join(question.split())}\nA:"


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts, without special ones."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


class Writer:
    """A model that `train_writer` made.

    Args:
        path: its directory.
        kind: of the texts it will be given.
        device: where it runs.
        tokens: of a batch, padding counted.

    Raises:
        OSError: there is none.
        ValueError: it is another model, or has not learned from this kind of text.
    """

    def __init__(self, path: str, kind: str, device: torch.device, tokens: int) -> None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.model, self.tokenizer = load_backbone(path, dtype=dtype, device=device)
        known = getattr(self.model.config, KINDS, None)
        if known is None:
            raise ValueError(
                f"{path} does not write questions: `python -m evaluation questions train` makes what does."
            )
        if kind not in known:
            raise ValueError(f"The writer {path} knows texts of the kinds {', '.join(known)}, got {kind!r}.")
        self.kind, self.tokens = kind, tokens
        self.tokenizer.padding_side = "left"
        pieces = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        self._ends = [i for i, text in enumerate(pieces) if "\n" in text or i == self.tokenizer.eos_token_id]
        """Of an answer: some tokenizers have tokens of a full stop and a new line."""

    def ask(self, texts: Sequence[str]) -> list[tuple[int, str, str]]:
        """Sampled questions, each with the number of its passage and the answer that was sampled with it."""
        asked: list[tuple[int, str, str]] = []
        sampled = {"do_sample": True, "top_p": TOP_P, "top_k": 0, "temperature": TEMPERATURE}
        prompts, ends = self._prompts(texts), [self.tokenizer.eos_token_id]
        for part, made, _ in self._generate(prompts, PAIRS_TOKENS, ends, **sampled):
            for i, text in zip(part, self.tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                pairs = {question.casefold(): (i, question, answer) for question, answer in _PAIR.findall(text)}
                asked += [pair for pair in pairs.values() if len(pair[1].split()) in QUESTION_WORDS]
        return sorted(asked, key=lambda pair: pair[0])

    def answer(self, texts: Sequence[str], questions: Sequence[str]) -> list[tuple[str, float]]:
        """The likeliest answer to a question on each passage, "" if it does not end, and the mean log probability of
        its tokens."""
        lines = token_ids(self.tokenizer, [question_line(question) for question in questions])
        prompts = [start + line for start, line in zip(self._prompts(texts), lines, strict=True)]
        answers = [("", 0.0)] * len(prompts)
        greedy = {"do_sample": False, "output_logits": True}
        model: Any = self.model
        for part, made, output in self._generate(prompts, ANSWER_TOKENS, self._ends, **greedy):
            scores = model.compute_transition_scores(output.sequences, output.logits, normalize_logits=True)
            end = torch.isin(made, torch.tensor(self._ends, device=made.device))
            counted = end.cumsum(1) - end.int() == 0  # the end itself, too
            means = (scores * counted).sum(1) / counted.sum(1)
            written = self.tokenizer.batch_decode(made, skip_special_tokens=True)
            for i, text, mean, ended in zip(part, written, means.tolist(), end.any(1).tolist(), strict=True):
                answers[i] = (text.split("\n")[0].strip() if ended else "", mean)
        return answers

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return token_ids(self.tokenizer, [prompt(self.kind, text) for text in texts])

    @torch.inference_mode()
    def _generate(
        self, prompts: list[list[int]], new: int, ends: list[int], **options: Any
    ) -> Iterator[tuple[list[int], Tensor, Any]]:
        """In batches: the numbers of prompts, the tokens that follow them, and all that `generate` says of these."""
        model: Any = self.model
        for part in batches([len(ids) + new for ids in prompts], self.tokens):
            inputs = self.tokenizer.pad({"input_ids": [prompts[i] for i in part]}, return_tensors="pt").to(model.device)
            made = model.generate(
                **inputs, **options, max_new_tokens=new, eos_token_id=ends, pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
            )  # fmt: skip
            yield part, made.sequences[:, inputs["input_ids"].shape[1] :], made
