"""Associative retrieval (GradMem, section 4.1): pairs in, context gone, keys asked.

    context  !k1k2:v1v2! for each pair, then |      query  ?!k1k2:      target  v1v2!|

One token per character, keys unique within a context, a random alphabet of letters and digits, so that nothing but the
context says what the value of a key is.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

PAD, EDGE, COLON, END, ASK = "<pad>", "!", ":", "|", "?"
ALPHABET = string.ascii_letters + string.digits
VOCABULARY = (PAD, EDGE, COLON, END, ASK, *ALPHABET)
_FIRST = len(VOCABULARY) - len(ALPHABET)
_TABLE_SIZE = 1 << 12  # up to so many possible keys a random order of all of them is drawn


def kv_tokenizer() -> PreTrainedTokenizerFast:
    """The task's tokenizer: one token per character, `|` ends a text."""
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=PAD))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token=PAD, eos_token=END)


def kv_backbone(
    *, layers: int = 4, width: int = 128, heads: int = 4, positions: int = 1024, **overrides: Any
) -> PreTrainedModel:
    """A Llama of the size the paper uses for this task, with random weights (standard deviation 0.02).

    The output embeddings start as a copy of the input embeddings and are trained apart.
    """
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY.index(PAD),
        eos_token_id=VOCABULARY.index(END),
        bos_token_id=None,
        **overrides,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


@dataclass
class KVBatch:
    """B contexts and Q queries on each, as tokens. Rows of one context follow one another."""

    context_input_ids: Tensor
    """[B, N], right padded."""
    context_attention_mask: Tensor
    """[B, N]."""
    input_ids: Tensor
    """[B * Q, T], query and target; all have the same length."""
    labels: Tensor
    """[B * Q, T], -100 on the query."""
    context_index: Tensor
    """[B * Q]."""

    def as_dict(self) -> dict[str, Tensor]:
        """The arguments of a model's forward."""
        return dict(vars(self))


@dataclass(frozen=True)
class KVRetrieval:
    """The task for contexts of `min_pairs` to `max_pairs` pairs.

    Args:
        max_pairs: the most pairs of a context.
        min_pairs: the fewest; default: `max_pairs`. Each context draws its own number.
        key_length, value_length: characters.
        noise: random characters after each pair, which nobody asks for.
    """

    max_pairs: int
    min_pairs: int | None = None
    key_length: int = 2
    value_length: int = 2
    noise: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_pairs", 1), ("key_length", 1), ("value_length", 1), ("noise", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be an integer from {least}, got {getattr(self, name)!r}.")
        if not 1 <= self.fewest <= self.max_pairs:
            raise ValueError(f"min_pairs must lie in 1 to max_pairs ({self.max_pairs}), got {self.min_pairs!r}.")
        if self.max_pairs > len(ALPHABET) ** self.key_length:
            raise ValueError(
                f"{self.max_pairs} unique keys of {self.key_length} characters do not exist; use a longer key_length."
            )

    @property
    def fewest(self) -> int:
        """The fewest pairs of a context."""
        return self.max_pairs if self.min_pairs is None else self.min_pairs

    @property
    def context_length(self) -> int:
        """Tokens of the longest context."""
        return self.max_pairs * self._segment + 1

    @property
    def _segment(self) -> int:
        return 3 + self.key_length + self.value_length + self.noise

    def sample(
        self, contexts: int, queries: int, device: torch.device | str = "cpu", seed: int | None = None
    ) -> KVBatch:
        """Draw a batch, made on `device` throughout.

        Args:
            contexts: B.
            queries: Q, on different pairs where each context has as many.
            seed: of this batch; None: the device's default generator (which a CUDA graph replays anew each time).
        """
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "device": device}

        def characters(*shape: int) -> Tensor:
            return torch.randint(_FIRST, len(VOCABULARY), shape, **options)

        def token(name: str, *shape: int) -> Tensor:
            return torch.full(shape, VOCABULARY.index(name), device=device)

        pairs = self.max_pairs
        counts = torch.randint(self.fewest, pairs + 1, (contexts, 1), **options)
        keys = self._distinct_keys(contexts, options)
        values = characters(contexts, pairs, self.value_length)
        edge, colon = token(EDGE, contexts, pairs, 1), token(COLON, contexts, pairs, 1)
        noise = characters(contexts, pairs, self.noise)
        text = torch.cat([edge, keys, colon, values, edge, noise], dim=2).flatten(1)
        text = torch.cat([text, token(PAD, contexts, 1)], dim=1)
        places = torch.arange(text.shape[1], device=device)
        end = counts * self._segment
        text = torch.where(places < end, text, token(PAD)).masked_fill(places == end, VOCABULARY.index(END))

        if queries <= self.fewest:
            order = torch.rand(contexts, pairs, **options)
            order = order.masked_fill(torch.arange(pairs, device=device) >= counts, -1)
            asked = order.topk(queries, dim=1).indices
        else:
            asked = (torch.rand(contexts, queries, **options) * counts).long()
        rows = torch.arange(contexts, device=device)[:, None]
        marks = [token(name, contexts, queries, 1) for name in (ASK, EDGE, COLON, EDGE, END)]
        query = torch.cat([marks[0], marks[1], keys[rows, asked], marks[2]], dim=2).flatten(0, 1)
        target = torch.cat([values[rows, asked], marks[3], marks[4]], dim=2).flatten(0, 1)
        return KVBatch(
            context_input_ids=text,
            context_attention_mask=(places <= end).long(),
            input_ids=torch.cat([query, target], dim=1),
            labels=torch.cat([torch.full_like(query, -100), target], dim=1),
            context_index=rows.expand(-1, queries).flatten(),
        )

    def _distinct_keys(self, contexts: int, options: dict[str, Any]) -> Tensor:
        """[contexts, max_pairs, key_length], no key twice in a context."""
        possible = len(ALPHABET) ** self.key_length
        if possible <= _TABLE_SIZE:
            numbers = torch.rand(contexts, possible, **options).topk(self.max_pairs, dim=1).indices
        else:  # sorted draws moved apart are distinct
            drawn = torch.randint(possible - self.max_pairs + 1, (contexts, self.max_pairs), **options).sort(dim=1)
            numbers = drawn.values + torch.arange(self.max_pairs, device=options["device"])
            shuffle = torch.rand(contexts, self.max_pairs, **options).argsort(dim=1)
            numbers = numbers.gather(1, shuffle)
        places = len(ALPHABET) ** torch.arange(self.key_length, device=options["device"])
        return numbers[..., None] // places % len(ALPHABET) + _FIRST

    def rows(self, count: int, queries: int, seed: int) -> Iterator[dict[str, Any]]:
        """`count` contexts with their queries and targets as texts, for `GradMemCollator`."""
        batch = self.sample(count, queries, seed=seed)
        asked = (batch.labels == -100).sum(1)
        texts = [
            ("".join(VOCABULARY[i] for i in row[:n]), "".join(VOCABULARY[i] for i in row[n:]))
            for row, n in zip(batch.input_ids.tolist(), asked.tolist(), strict=True)
        ]
        for i, (row, mask) in enumerate(zip(batch.context_input_ids, batch.context_attention_mask, strict=True)):
            mine = texts[i * queries : (i + 1) * queries]
            yield {
                "context": "".join(VOCABULARY[j] for j in row[mask.bool()].tolist()),
                "queries": [query for query, _ in mine],
                "targets": [target for _, target in mine],
            }


def kv_exact_match(prediction: str, target: str) -> bool:
    """Whether generated text begins with the target's value, which ends at the first `!`."""
    return prediction.split(EDGE)[0] == target.split(EDGE)[0]


def kv_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """[R], whether greedy decoding gets the value of each query, from logits [R, T, V] with the target given.

    Equal to decoding token by token: as long as every choice is right the given tokens are the chosen ones, and after a
    wrong choice the value is wrong anyhow. The last two target tokens, `!|`, are not part of the value.
    """
    choices, expected = logits[:, :-1].argmax(-1), labels[:, 1:]
    counts = (expected != -100) & (torch.arange(expected.shape[1], device=labels.device) < expected.shape[1] - 2)
    return ((choices == expected) | ~counts).all(1)
