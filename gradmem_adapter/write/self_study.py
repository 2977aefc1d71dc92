"""Self-study: WRITE for a backbone that was not trained to write. The model asks itself questions about the context,
and memory learns to give the same answers as the text. Cartridges (arXiv 2506.06266) do this with caches of keys and
values.

It takes seconds to minutes per context: queries and answers are generated once, and each write step is a forward and a
backward pass over `Study.batch` of them, after one pass over the memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from gradmem_adapter.ops.answers import shares_caches, states_of_answers
from gradmem_adapter.ops.output_head import output_head
from gradmem_adapter.ops.padding import pad
from gradmem_adapter.outputs import WriteProgress
from gradmem_adapter.utils.backbone import device_of, max_positions, trunk
from gradmem_adapter.utils.wording import counted
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loop import Written, write_memory
from gradmem_adapter.write.loss import Pass, Writer
from gradmem_adapter.write.options import Study, WriteOptions

STEPS = 100
"""The default number of write steps."""
LR = 0.1
"""The default of the first write learning rate, as a share of the root mean square of the embeddings: how far one step
of Adam moves an element of the memory."""
TEMPERATURE = 0.7
"""The temperature at which the model's queries are sampled."""


def study_contexts(
    writer: Writer,
    context: Context,
    options: WriteOptions,
    initial: Tensor | None = None,
    callback: Callable[[WriteProgress], None] | None = None,
) -> Written:
    """WRITE contexts by self-study, each by itself.

    Args:
        writer (`Writer`): the model; its adapter must not change how the backbone reads.
        context (`Context`): B contexts.
        options (`WriteOptions`): with `study`; steps, lr and optimizer default to STEPS, LR and Adam.
        initial (`Tensor`, *optional*): `[B, m, d]`, a memory to continue from, in place of `unexpected_tokens`.
        callback (`Callable`, *optional*): called at each step.

    Returns:
        `Written`: its losses are `SelfStudy.loss`: at each step of different queries, after the last step of all
        queries.

    Raises:
        ValueError: the adapter changes how the backbone reads, or a context is too long, or a memory too large, for the
            model's positions to hold a question as well.
    """
    config = writer.config
    if config.lora_config is not None or config.memory_projection != "none" or config.num_control_tokens:
        raise ValueError(
            "objective='self_study' needs an unchanged backbone, but this adapter reads with a LoRA, a memory "
            "projection or control vectors. Use objective='reconstruction', or create an adapter without them: "
            "get_peft_model(backbone, GradMemConfig(num_memory_tokens=...))."
        )
    steps = STEPS if options.steps is None else options.steps
    with torch.inference_mode(False), torch.no_grad():  # tensors created in inference mode cannot take part in autograd
        texts = [ids[:length].tolist() for ids, length in zip(context.input_ids, context.lengths, strict=True)]
        needed = steps or options.last_loss
        if needed:
            vectors = config.num_memory_tokens if initial is None else initial.shape[1]
            _check_positions(writer.backbone, max(map(len, texts)), vectors, options.study)
        lessons = [learn(writer, text, options.study) for text in texts] if needed else []
        rate = LR * _size_of_embeddings(writer.backbone) if options.lr is None else options.lr
        if initial is None:
            initial = torch.stack([unexpected_tokens(writer, text) for text in texts])
    options = replace(options, steps=steps, optimizer=options.optimizer or "adam")
    rates = [rate * (1 - step / steps) for step in range(steps)]  # to zero: each step sees different queries
    return write_memory(writer, initial, context, rates, options, callback, SelfStudy(writer, lessons, options.study))


def _check_positions(backbone: Any, text: int, vectors: int, study: Study) -> None:
    """Raise `ValueError` if a question and its answer do not fit after the longest text, or after the memory."""
    positions = max_positions(backbone)
    if positions is None:
        return
    requests, openings = ([len(part) for part in parts] for parts in zip(*study.requests or [((), ())], strict=True))
    around = len(study.before) + len(study.after) + study.query_tokens + study.answer_tokens
    longest = max(request + opening for request, opening in zip(requests, openings, strict=True))
    shown = text + len(study.between) + longest + around
    # Without requests nothing is asked after the memory, and the last token of an answer is not read.
    read = vectors - 1 + (max(openings) + around if study.requests else study.answer_tokens)
    for what, needed in (
        (f"A context has {counted(text, 'token')}", shown),
        (f"The state has {counted(vectors, 'vector')}", read),
    ):
        if needed > positions:
            raise ValueError(
                f"{what}. With a question and its answer it takes {needed} positions, but the model has {positions}. "
                "Use a shorter one, or lower Study.query_tokens or Study.answer_tokens."
            )


class Lesson(NamedTuple):
    """A query that the model asked itself, with its answer given the text.

    Args:
        query (`list[int]`): the tokens between memory and answer.
        answer (`list[int]`): the tokens of the answer, including the end token.
        hidden (`Tensor`): `[len(answer), h]`, the last hidden states that predict the answer given the text.
    """

    query: list[int]
    answer: list[int]
    hidden: Tensor


class SelfStudy:
    """What a step of self-study computes for memories; replaces `write_pass` in the loop."""

    def __init__(self, writer: Writer, lessons: Sequence[list[Lesson]], study: Study) -> None:
        self.writer, self.lessons, self.batch = writer, lessons, study.batch
        self.draw = torch.Generator("cpu").manual_seed(study.seed)
        self.waiting: list[int] = []

    def __call__(self, memory: Tensor, context: Context, gradient: bool, recovered: bool) -> Pass:
        """Gradient, losses and share of first choices over some of the lessons; without gradient, over all of them."""
        chosen = self._next() if gradient else list(range(len(self.lessons[0])))
        slopes: list[Tensor] = []
        losses, same = [], []
        for row, lessons in zip(memory.detach().split(1), self.lessons, strict=True):  # one graph at a time
            with torch.set_grad_enabled(gradient):
                leaf = row.clone().requires_grad_(gradient)
                loss, share = self.loss(leaf, [lessons[i] for i in chosen])
                slopes += torch.autograd.grad(loss, leaf) if gradient else ()
            losses.append(loss.detach())
            same.append(share)
        slope = torch.cat(slopes) if gradient else None
        return Pass(slope, torch.stack(losses), torch.stack(same) if recovered else None)

    def _next(self) -> list[int]:
        """The lessons of a step: all are used once before one is used again."""
        if len(self.waiting) < self.batch:
            self.waiting += torch.randperm(len(self.lessons[0]), generator=self.draw, device="cpu").tolist()
        chosen, self.waiting = self.waiting[: self.batch], self.waiting[self.batch :]
        return chosen

    def loss(self, memory: Tensor, lessons: Sequence[Lesson]) -> tuple[Tensor, Tensor]:
        """The distance between answers from memory and answers given the text (the mean over answer tokens y_t of all
        queries q):

            KL( p(. | [C; q; y_<t])  ||  p(. | [M; q; y_<t]) )

        Args:
            memory (`Tensor`): `[1, m, d]`, M.
            lessons (`Sequence[Lesson]`): lessons of its context.

        Returns:
            The loss in nats per token, and the share of tokens that are the first choice of both.
        """
        backbone, slots = self.writer.backbone, self.writer.slots
        prefix = slots.prefix(memory, "read", self.writer.adapter)
        hidden = states_of_answers(backbone, prefix, [(lesson.query, lesson.answer) for lesson in lessons])
        head = output_head(backbone)
        found = head(torch.cat(hidden)[None])[0].float().log_softmax(-1)
        with torch.no_grad():
            right = head(torch.cat([lesson.hidden for lesson in lessons])[None])[0].float().log_softmax(-1)
        same = (found.argmax(-1) == right.argmax(-1)).float().mean()
        return F.kl_div(found, right, reduction="batchmean", log_target=True), same.detach()


def learn(writer: Writer, text: list[int], study: Study) -> list[Lesson]:
    """Let the model ask itself questions about a context, and answer them given the text."""
    backbone, shown = writer.backbone, [*study.before, *text, *study.between]
    draw = torch.Generator(device_of(backbone)).manual_seed(study.seed)
    if study.requests:
        asked = [study.requests[i % len(study.requests)] for i in range(study.queries)]
        rows = [[*request, *study.after, *opening] for request, opening in asked]
        made = _generate(backbone, shown, rows, study.query_tokens, study.query_ends, draw)
        queries = [[*opening, *query] for (_, opening), query in zip(asked, made, strict=True)]
        rows = [[*query, *study.after] for query in queries]
        answers = _generate(backbone, shown, rows, study.answer_tokens)
    else:  # no requests given: let the model continue the text
        rows = [[]] * study.queries
        answers = _generate(backbone, shown, rows, study.answer_tokens, (), draw)
    before = backbone.get_input_embeddings()(torch.tensor([shown], device=device_of(backbone)))
    hidden = states_of_answers(backbone, before, list(zip(rows, answers, strict=True)))
    return [
        Lesson([*study.before, *row] if row else [], answer, states.clone())
        for row, answer, states in zip(rows, answers, hidden, strict=True)
    ]


def unexpected_tokens(writer: Writer, text: list[int]) -> Tensor:
    """Where self-study starts: the embeddings of the m tokens of a context that the model expects least, in order:

        M_0 = embeddings of { t_i : -log p(t_i | t_<i) among the m largest }.

    Memory need not hold what the model can guess, and the model reads its own tokens without any training. If the
    context has fewer than m tokens, they are repeated.

    Returns:
        `Tensor`: `[m, d]`.
    """
    backbone, m = writer.backbone, writer.config.num_memory_tokens
    ids = torch.tensor(text, device=device_of(backbone))
    if len(text) <= m:
        kept = torch.arange(m, device=ids.device) * len(text) // m
    else:
        scores = backbone(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        surprise = -scores.gather(1, ids[1:, None])[:, 0]
        first = surprise.new_full((1,), torch.inf)  # nothing predicts the first token
        kept = torch.cat([first, surprise]).topk(m).indices.sort().values
    embeddings = backbone.get_input_embeddings()(ids[kept])
    return cast(Tensor, embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))


def _size_of_embeddings(backbone: Any) -> float:
    """The root mean square of the embeddings of a thousand tokens, as the model's first layer receives them."""
    embeddings = backbone.get_input_embeddings()
    count = embeddings.weight.shape[0]
    tokens = torch.arange(0, count, max(1, count // 1000), device=device_of(backbone))
    return float(embeddings(tokens).float().square().mean().sqrt())


class _Sample(LogitsProcessor):
    """Adds Gumbel noise, which makes the first choice a sample, drawn with our own generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.rand(scores.shape, generator=self.generator, device=scores.device)
        return scores.float() / TEMPERATURE - (-uniform.clamp(min=1e-20).log()).log()


def _generate(
    backbone: Any,
    shown: list[int],
    rows: list[list[int]],
    count: int,
    ends: Sequence[int] = (),
    draw: torch.Generator | None = None,
) -> list[list[int]]:
    """At most `count` new tokens after `[shown; row]`, up to and including an end token or one of `ends`.

    With `draw` they are sampled, otherwise decoded greedily. The backbone's generation configuration is ignored:
    settings such as repetition penalties would change what the model itself says.
    """
    end = backbone.generation_config.eos_token_id
    stops = [*(end if isinstance(end, list) else [] if end is None else [end]), *ends]
    cache = None
    if shares_caches(backbone) and len(shown) > 1:
        first, rows = torch.tensor([shown[:-1]]), [[shown[-1], *row] for row in rows]  # `generate` needs a new token
        cache = DynamicCache(config=backbone.config)
        trunk(backbone)(first.to(device_of(backbone)), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
        ids, mask = pad(rows, "left")
        ids = torch.cat([first.expand(len(rows), -1), ids], dim=1)
        mask = torch.cat([mask.new_ones(len(rows), first.shape[1]), mask], dim=1)
    else:
        ids, mask = pad([[*shown, *row] for row in rows], "left")
    plain = copy.copy(backbone)  # another thread may be using the backbone
    plain.generation_config = GenerationConfig()
    output = plain.generate(
        ids.to(device_of(backbone)),
        attention_mask=mask.to(device_of(backbone)),
        past_key_values=cache,
        logits_processor=LogitsProcessorList([] if draw is None else [_Sample(draw)]),
        generation_config=GenerationConfig(
            max_new_tokens=count, min_new_tokens=1, do_sample=False, eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0,
        ),
    )  # fmt: skip
    new = output[:, ids.shape[1] :].tolist()
    lengths = [next((i for i, token in enumerate(row) if token in stops), len(row) - 1) + 1 for row in new]
    return [row[:length] for row, length in zip(new, lengths, strict=True)]
