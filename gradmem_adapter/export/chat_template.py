"""Chat templates that move memory before the conversation, wherever in its messages it was sent."""

from __future__ import annotations

MARK = "<prompt_embeds>"
"""The mark that vLLM puts in place of an embeddings part: as a line of the message's text, or as a part of its own."""

_BEGINNING = (
    "{%- set found = namespace(memory='', messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set content, count = message.content, 0 -%}"
    "{%- if content is string -%}"
    "{%- set count = content.count('<MARK>') -%}"
    "{%- set content = content.replace('<MARK>\\n', '').replace('\\n<MARK>', '').replace('<MARK>', '') -%}"
    "{%- elif content -%}"
    "{%- set count = content | selectattr('text', 'equalto', '<MARK>') | list | length -%}"
    "{%- set content = content | rejectattr('text', 'equalto', '<MARK>') | list -%}"
    "{%- endif -%}"
    "{%- set found.memory = found.memory ~ '<MARK>' * count -%}"
    "{%- set found.messages = found.messages + [dict(message, content=content) if count else message] -%}"
    "{%- endfor -%}"
    "{%- set messages = found.messages -%}"
    "{%- if found.memory %}{{ found.memory }}{% endif %}\n"
).replace("<MARK>", MARK)


def memory_first(template: str) -> str:
    """A chat template that moves the marks of all memories to the front; without marks, nothing changes.

    The adapter was trained on `[memory; prompt]`, and an engine puts the vectors where the marks are.

    Args:
        template (`str`): the Jinja template, as Transformers and vLLM run it.
    """
    return _BEGINNING + template
