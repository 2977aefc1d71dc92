"""Tables of the causal LMs of Transformers on which GradMem is right."""

from __future__ import annotations

from .cells import Frame, read

VERDICTS = {
    "passes": "passes everything",
    "refused": "refused when the adapter is attached",
    "limit": "the backbone's own limit",
    "wrong": "wrong",
    "crashes": "crashes later",
}
"""The verdicts of `evaluation.backbones.check`, in words."""
REASONS = {
    "padded on the left": "reads no queries padded on the left: `generate` takes prompts of one length at a time",
    "cross kinks": "finite differences met a kink in the first draw and are right in another; `exact` is right",
    "later tokens do": "sees later tokens",
    "both directions": "sees later tokens",
    "several tables": "has several tables of embeddings (codebooks of audio)",
    "backward pass": "passes no gradient on in eval mode",
    "own generate": "decodes some batches otherwise than its forward pass, without an adapter too",
    "generate()": "decodes batches wrongly, without an adapter too",
    "shared_kv_states": "drafts for another model and needs its keys and values",
    "inputs_embeds": "needs token ids besides embeddings, or fails on embeddings alone",
    "cannot be built": "cannot be made from its default configuration here",
}
"""Descriptions of reasons, by words that occur in them; the first match counts."""


def models_summary() -> Frame:
    """The number of types for each verdict."""
    counts = read("models")["verdict"].map(VERDICTS).value_counts().reindex(VERDICTS.values(), fill_value=0)
    return Frame({"": [*counts.index, "all"], "types": [*counts, counts.sum()]})


def models_reasons() -> Frame:
    """The types that did not simply pass, grouped by the reason."""
    table = read("models").query("reason != ''").sort_values("dataset")
    texts = [[said for words, said in REASONS.items() if words in reason][:1] or [reason] for reason in table["reason"]]
    table = table.assign(what=[text for (text,) in texts], verdict=table["verdict"].map(VERDICTS))
    groups = table.groupby(["verdict", "what"])["dataset"].agg(", ".join).reset_index()
    order = groups["verdict"].map([*VERDICTS.values()].index)
    groups = groups.assign(order=order).sort_values("order", kind="stable").drop(columns="order")
    return groups.set_axis(["", "what was found", "types"], axis="columns")


def models() -> Frame:
    """Every type, with its class and verdict."""
    table = read("models").sort_values("dataset")
    return Frame({"type": table["dataset"], "class": table["model"], "": table["verdict"].map(VERDICTS)})


TABLES = (models, models_reasons, models_summary)
