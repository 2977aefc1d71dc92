"""What one call sends to the model: chat messages, and the memory states that they refer to."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from gradmem_adapter import GradMemPipeline, MemoryState, MemoryStateError, UnknownStateError
from gradmem_adapter.store import search_scores

from .messages import accepted, template_entry
from .references import MARKER, check_references, references_of
from .stores import MemoryStateStore


class Request(NamedTuple):
    """What one call asks the pipeline for."""

    chat: list[dict[str, Any]]
    query: str
    """The text of the last human message."""
    states: dict[str, MemoryState]
    """By reference, that the messages refer to, at most `max_states`."""

    def memory(
        self, pipeline: GradMemPipeline, store: MemoryStateStore, side_by_side: bool | None, **how: Any
    ) -> tuple[MemoryState | None, list[str], float | None]:
        """What is read, with its references, as chosen by `pipeline.select`, and its support for an answer, if known.

        Args:
            pipeline (`GradMemPipeline`): what is to read.
            store (`MemoryStateStore`): where the states are.
            side_by_side (`bool`, *optional*): None: if the adapter was not trained to refuse.
            how: arguments for the chat template.
        """
        references, states = list(self.states), list(self.states.values())
        if not states:
            return None, [], None
        by_words = partial(search_scores, store.store.index, pipeline.model.fingerprint(), self.query, references)
        read = pipeline.select(self.chat, memory=states, side_by_side=side_by_side, search_scores=by_words, **how)
        return read.memory, [references[i] for i in read.states], read.support


def request_of(
    messages: Sequence[BaseMessage],
    memory: Any,
    pipeline: GradMemPipeline,
    store: MemoryStateStore,
    max_states: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Request:
    """A call's messages as chat templates take them, and the states it reads.

    If there are references to more than `max_states` states, bound ones come first, then those of the last human
    message and what follows it, in their order, then older ones, newest first. The rest are left out with a warning.

    Args:
        messages (`Sequence[BaseMessage]`): with a human message among them.
        memory (`str` or `list[str]`, *optional*): references bound to the call.
        pipeline (`GradMemPipeline`): what is to read them.
        store (`MemoryStateStore`): where the states are.
        max_states (`int`): the most states to read.
        chat_template_kwargs (`Mapping`, *optional*): other arguments for the chat template.

    Raises:
        ValueError: there is no human message, or the last one is empty; something is not a reference; more states are
            bound than may be read.
        UnknownStateError, MemoryStateError: a state that this turn needs is missing or cannot be read. One that an
            earlier message carried is left out with a warning, so that the conversation can continue.
    """
    human = [i for i, message in enumerate(messages) if isinstance(message, HumanMessage)]
    if not human:
        raise ValueError("There is no human message to answer: pass at least one HumanMessage.")
    bound = [] if memory is None else check_references(memory)
    if len(bound) > max_states:
        raise ValueError(
            f"The call is bound to {len(bound)} memory states, but at most {max_states} are read: retrieve fewer "
            "documents (k), or raise max_states."
        )
    carried = [references_of(message) for message in messages]
    everything = list(dict.fromkeys(chain(bound, *carried)))
    _warn_of_lost_markers(messages, everything, store)

    turn = list(chain(*carried[human[-1] :]))
    older = [reference for references in reversed(carried[: human[-1]]) for reference in reversed(references)]
    chosen = list(dict.fromkeys([*bound, *turn, *older]))[:max_states]
    if len(chosen) < len(everything):
        warnings.warn(
            f"The messages refer to {len(everything)} memory states, more than max_states: "
            f"{len(everything) - len(chosen)} are left out, first those of older turns, then the last ones of this "
            "turn. Attach fewer documents (k), keep attached messages out of the history, or raise max_states.",
            stacklevel=2,
        )
    needed = {*bound, *turn, *chain(*(c for c, m in zip(carried, messages, strict=True) if _is_carrier(m)))}
    states = _states([r for r in everything if r in chosen], needed, pipeline.model.fingerprint(), store)
    entries = [template_entry(message, everything) for message in messages]
    # Several human messages may ask together: the last one is empty if it held only documents that are now in memory.
    answered = max((i for i in range(human[-1]) if isinstance(messages[i], AIMessage)), default=0)
    if not any(entries[i]["content"].strip() for i in human if i >= answered):
        raise ValueError("The last human message is empty: pass a question, or another text to answer.")
    chat = [entry for entry, m in zip(entries, messages, strict=True) if entry["content"].strip() or not _is_carrier(m)]
    format_query = partial(pipeline.format_query, chat_template_kwargs=chat_template_kwargs)
    return Request(accepted(chat, format_query), entries[human[-1]]["content"], states)


def identity_of(pipeline: GradMemPipeline) -> dict[str, str]:
    """Identifies pipelines that answer alike: the model's fingerprint, and a digest of the pipeline's other parts."""
    model = pipeline.model
    rest = [model.active_peft_config.refusal, pipeline.tokenizer.chat_template, model.generation_config.to_diff_dict()]
    told = json.dumps([*rest, model.dtype, type(pipeline.reader).__name__], sort_keys=True, default=str)
    return {"fingerprint": model.fingerprint(), "told": hashlib.sha256(told.encode()).hexdigest()}


def _is_carrier(message: BaseMessage) -> bool:
    """Whether a message stands for turns in memory. If its notice is empty, it is not shown to the model."""
    return isinstance(message, SystemMessage) and bool(references_of(message))


def _states(
    references: Sequence[str], needed: set[str], fingerprint: str, store: MemoryStateStore
) -> dict[str, MemoryState]:
    states = {}
    for reference in references:
        try:
            states[reference] = store.get(reference, fingerprint=fingerprint)
        except (UnknownStateError, MemoryStateError) as error:
            if reference in needed:
                raise
            warnings.warn(f"{error} Only an earlier message refers to this state, so it is left out.", stacklevel=3)
    return states


def _warn_of_lost_markers(messages: Sequence[BaseMessage], known: Sequence[str], store: MemoryStateStore) -> None:
    """Warn of markers whose references were lost on the way, for instance in a prompt of one string."""
    shown = dict.fromkeys(reference for message in messages for reference in MARKER.findall(str(message.text)))
    lost = [reference for reference in shown if reference not in known][:8]
    if lost and any(state is not None for state in store.mget(lost)):
        warnings.warn(
            "A message shows the marker of a memory state that no message carries: the model reads [[gradmem:...]] as "
            "text instead of the memory. Markers alone are never resolved, and references are lost when messages are "
            "joined into one string. For documents, use create_gradmem_stuff_chain; for histories, a prompt with a "
            "MessagesPlaceholder; otherwise, attach(message, references).",
            stacklevel=3,
        )
