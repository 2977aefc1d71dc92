"""The writer of questions: the format of its prompts, and how it asks and answers questions."""

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
"""The field of a writer's configuration with the kinds of text that it was trained on."""
TOP_P, TEMPERATURE = 0.95, 0.9
"""The temperature for sampling questions."""
PAIRS_TOKENS, ANSWER_TOKENS = 150, 24
"""The most new tokens: for all questions on a passage with their answers, and for one answer."""
QUESTION_WORDS = range(3, 41)
_PAIR = re.compile(r"Q: (.+)\nA: (.+)\n")


def prompt(kind: str, context: str) -> str:
    """The prompt for questions on a passage."""
    return f"{kind.capitalize()}:\n{context}\n\nQuestions and answers:\n"


def question_line(question: str) -> str:
    """A question, and the beginning of its answer's line."""
    return f"Q: {' '.join(question.split())}\nA:"


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts, without special ones."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


class Writer:
    """A model from `train_writer`.

    Args:
        path: its directory.
        kind: the kind of the texts that it will read.
        device: where it runs.
        tokens: the most tokens in a batch, including padding.

    Raises:
        OSError: there is no model.
        ValueError: it is not a writer, or was not trained on this kind of text.
    """

    def __init__(self, path: str, kind: str, device: torch.device, tokens: int) -> None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.model, self.tokenizer = load_backbone(path, dtype=dtype, device=device)
        known = getattr(self.model.config, KINDS, None)
        if known is None:
            raise ValueError(
                f"{path} is not a writer of questions: train one with `python -m evaluation questions train`."
            )
        if kind not in known:
            raise ValueError(f"The writer {path} was trained on texts of the kinds {', '.join(known)}, got {kind!r}.")
        self.kind, self.tokens = kind, tokens
        self.tokenizer.padding_side = "left"
        pieces = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        self._ends = [i for i, text in enumerate(pieces) if "\n" in text or i == self.tokenizer.eos_token_id]
        """Tokens that end an answer, including those of a full stop and a new line that some tokenizers have."""

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
        """The greedy answer to a question on each passage ("" if it does not end), and the mean log probability of its
        tokens."""
        lines = token_ids(self.tokenizer, [question_line(question) for question in questions])
        prompts = [start + line for start, line in zip(self._prompts(texts), lines, strict=True)]
        answers = [("", 0.0)] * len(prompts)
        greedy = {"do_sample": False, "output_logits": True}
        model: Any = self.model
        for part, made, output in self._generate(prompts, ANSWER_TOKENS, self._ends, **greedy):
            scores = model.compute_transition_scores(output.sequences, output.logits, normalize_logits=True)
            end = torch.isin(made, torch.tensor(self._ends, device=made.device))
            counted = end.cumsum(1) - end.int() == 0  # including the end token
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
        """For each batch: the numbers of its prompts, the new tokens, and the whole output of `generate`."""
        model: Any = self.model
        for part in batches([len(ids) + new for ids in prompts], self.tokens):
            inputs = self.tokenizer.pad({"input_ids": [prompts[i] for i in part]}, return_tensors="pt").to(model.device)
            made = model.generate(
                **inputs, **options, max_new_tokens=new, eos_token_id=ends, pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
            )  # fmt: skip
            yield part, made.sequences[:, inputs["input_ids"].shape[1] :], made
