"""The exported chat template puts memory first, and equals the tokenizer's own where there is none."""

import pytest
from tiny import tiny_tokenizer

from gradmem_adapter.export.chat_template import MARK, memory_first

CHAT = [
    {"role": "system", "content": "w1"},
    {"role": "user", "content": "w2 w3"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "w4"}]},
    {"role": "user", "content": [{"type": "text", "text": "w5"}]},
]
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}\n"
    "  {% for message in messages %}\n<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}{% elif message.content %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% else %}{{ message.tool_calls }}{% endif %}\n"
    "{% endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def render(template, messages):
    tokenizer = tiny_tokenizer(chat_template=template)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def user(content):
    return [*CHAT[:3], {"role": "user", "content": content}]


@pytest.mark.parametrize("template", [TEMPLATE, "  " + TEMPLATE, "{{ bos_token }}" + TEMPLATE, "\n" + TEMPLATE])
def test_without_memory_nothing_changes(template):
    assert render(memory_first(template), CHAT) == render(template, CHAT)


@pytest.mark.parametrize(
    "content",
    [
        f"{MARK}\nw5 w6",
        f"w5 w6\n{MARK}",
        [{"type": "text", "text": MARK}, {"type": "text", "text": "w5 w6"}],
        [{"type": "text", "text": "w5 w6"}, {"type": "text", "text": MARK}],
    ],
)
@pytest.mark.parametrize("template", [TEMPLATE, "{{ bos_token }}" + TEMPLATE])
def test_memory_comes_before_everything(template, content):
    assert render(memory_first(template), user(content)) == MARK + render(template, user("w5 w6"))


def test_several_memories_of_several_messages():
    chat = [{"role": "system", "content": f"{MARK}\n{MARK}\nw1"}, {"role": "user", "content": f"w2\n{MARK}"}]
    expected = render(TEMPLATE, [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}])
    assert render(memory_first(TEMPLATE), chat) == MARK * 3 + expected
