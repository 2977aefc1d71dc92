"""What chat templates are given, and tool calls in both directions."""

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_gradmem import ChatGradMem, TurnMemory
from langchain_gradmem.messages import parse_tool_calls
from langchain_gradmem.requests import request_of
from tiny_pipeline import tiny_pipeline


@pytest.fixture
def chat(pipeline):
    return ChatGradMem(pipeline=pipeline, max_tokens=6)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no human message"),
        ([SystemMessage("w1")], "no human message"),
        (
            [HumanMessage([{"type": "text", "text": "w1"}, {"type": "image_url", "image_url": {"url": "x"}}])],
            "block of type 'image_url'",
        ),
    ],
)
def test_unsupported_messages_are_refused(chat, messages, message):
    with pytest.raises(ValueError, match=message):
        chat.invoke(messages)


def test_text_blocks_are_joined(chat):
    blocks = HumanMessage([{"type": "text", "text": "w3 "}, {"type": "text", "text": "w4"}])
    assert chat.invoke([blocks]).content == chat.invoke("w3 w4").content


def test_only_the_text_of_another_models_answer_is_used(chat):
    """As in a conversation that began with a hosted model, or fell back from one."""
    said = AIMessage([{"type": "thinking", "thinking": "w9"}, {"type": "text", "text": "w5"}, {"type": "reasoning"}])
    whole = chat.invoke([HumanMessage("w3"), said, HumanMessage("w4")])
    assert whole.content == chat.invoke([HumanMessage("w3"), AIMessage("w5"), HumanMessage("w4")]).content
    with pytest.raises(ValueError, match="block of type 'thinking'"):
        chat.invoke([HumanMessage([{"type": "thinking", "thinking": "w9"}])])


RULES = {
    "none": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
    "at the beginning": "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning') }}{% endif %}{% endfor %}",
    "anywhere": "",
    "left out": "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",
}


def asked(chat, messages):
    return request_of(messages, None, chat.pipeline, chat.store, chat.max_states)


class TestSystemRole:
    """Most open models have templates without a system role, or with one at the beginning only."""

    @pytest.fixture(params=RULES)
    def chat(self, request):
        pipeline = tiny_pipeline()
        pipeline.tokenizer.chat_template = RULES[request.param] + pipeline.tokenizer.chat_template
        return ChatGradMem(pipeline=pipeline, max_tokens=2)

    @pytest.mark.parametrize(
        "messages",
        [
            [SystemMessage("w7"), HumanMessage("w1")],
            [HumanMessage("w1"), SystemMessage("w7"), HumanMessage("w2")],
            [SystemMessage("w7"), SystemMessage("w8"), HumanMessage("w1"), AIMessage("w2"), HumanMessage("w3")],
        ],
    )
    def test_the_text_of_system_messages_is_kept(self, chat, messages):
        shown = chat.pipeline.format_query(asked(chat, messages).chat)[0]
        assert all(message.content in shown for message in messages)

    def test_a_part_of_a_conversation_is_counted(self, chat):
        """As `trim_messages` asks for, even with nothing but the system message."""
        assert chat.get_num_tokens_from_messages([SystemMessage("w7")]) > 0

    def test_histories_work(self, chat, turn):
        memory = TurnMemory.from_chat(chat, max_turns=1, keep_turns=1)
        messages = [SystemMessage("w7"), *(m for i in range(3) for m in turn(i)), HumanMessage("w1")]
        assert chat.invoke(memory.shown(messages)).usage_metadata["input_token_details"]["memory_vectors"] == 3

    def test_a_carrier_without_a_notice_is_not_shown(self, chat, turn):
        memory = TurnMemory.from_chat(chat, max_turns=1, keep_turns=1, notice="")
        request = asked(chat, memory.shown([*turn(0), *turn(1), HumanMessage("w1")]))
        assert [entry["role"] for entry in request.chat] == ["user"]
        assert len(request.states) == 1


def test_a_template_that_always_refuses_is_a_value_error():
    pipeline = tiny_pipeline()
    pipeline.tokenizer.chat_template = "{{ raise_exception('Never') }}"
    with pytest.raises(ValueError, match=r"does not show the text of system messages.* The template says: Never"):
        ChatGradMem(pipeline=pipeline).invoke([SystemMessage("w7"), HumanMessage("w1")])


def test_a_template_that_drops_all_messages_is_a_value_error():
    pipeline = tiny_pipeline()
    pipeline.tokenizer.chat_template = "w1"
    with pytest.raises(ValueError, match=r"does not show the text of system messages. Put it into a user message\.$"):
        ChatGradMem(pipeline=pipeline).invoke([SystemMessage("w7"), HumanMessage("w1")])


TOOLS_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}{% endif %}"
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} "
    "{% for call in message.get('tool_calls', []) %}{{ call['function']['name'] }} {% endfor %}{% endfor %}"
)


def w5(w6: int) -> int:
    """Adds one.

    Args:
        w6: a number.
    """
    return w6 + 1


class TestTools:
    @pytest.fixture
    def caller(self, monkeypatch):
        """A model whose template supports tools, and whose answers a test sets."""
        caller = ChatGradMem(pipeline=tiny_pipeline(), max_tokens=4)
        caller.pipeline.tokenizer.chat_template = TOOLS_TEMPLATE
        said = []
        monkeypatch.setattr(type(caller.pipeline.tokenizer), "decode", lambda *args, **kwargs: said[-1])
        return caller, said

    def test_tools_are_refused_if_the_template_does_not_support_them(self, chat):
        with pytest.raises(NotImplementedError, match="chat template does not support tools"):
            chat.bind_tools([w5])
        for messages in (
            [HumanMessage("w1"), ToolMessage("w2", tool_call_id="1")],
            [HumanMessage("w1"), AIMessage("", tool_calls=[{"name": "w5", "args": {}, "id": "1"}])],
        ):
            with pytest.raises(NotImplementedError, match="leave tools and tool messages out"):
                chat.invoke(messages)

    def test_tools_reach_the_prompt(self, caller):
        chat, said = caller
        said.append("w1")
        without, bound = chat.invoke("w3"), chat.bind_tools([w5]).invoke("w3")
        assert bound.usage_metadata["input_tokens"] == without.usage_metadata["input_tokens"] + 1
        messages = [
            HumanMessage("w3"),
            AIMessage("", tool_calls=[{"name": "w5", "args": {"w6": 1}, "id": "1"}]),
            ToolMessage("w7", tool_call_id="1"),
        ]
        assert chat.bind_tools([w5]).invoke(messages).content == "w1"

    def test_tool_calls_are_parsed(self, caller):
        chat, said = caller
        said.append('w1 <tool_call>{"name": "w5", "arguments": {"w6": 1}}</tool_call>')
        message = chat.bind_tools([w5]).invoke("w3")
        assert message.content == "w1"
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [("w5", {"w6": 1})]
        (chunk,) = chat.bind_tools([w5]).stream("w3")
        assert chunk.tool_calls[0]["args"] == {"w6": 1}
        assert chat.invoke("w3").tool_calls == [], "without tools it is text"

    def test_broken_tool_calls_are_reported_as_invalid(self, caller):
        chat, said = caller
        said.append("<tool_call>{broken</tool_call>")
        message = chat.bind_tools([w5]).invoke("w3")
        assert message.tool_calls == []
        assert message.invalid_tool_calls[0]["args"] == said[0]

    @pytest.mark.parametrize(
        "body",
        [
            *('{"name": w5}', '{"name"', '{"arguments": {}}', '["name"]'),
            *(f'{{"name": {name}}}' for name in ("5", "null", '["w5"]', '""')),
            *(f'{{"name": "w5", "arguments": {said}}}' for said in ('["w6"]', '[["w6", 1]]', "0", '""', "false")),
        ],
    )
    def test_streams_report_broken_tool_calls_as_invoke_does(self, caller, body):
        chat, said = caller
        broken = f"<tool_call>{body}</tool_call>"
        said.append(f'w1 {broken}<tool_call>{{"name": "w5"}}</tool_call>')
        streamed = chat.model_copy(update={"streaming": True}).bind_tools([w5]).invoke("w3")
        chat = chat.bind_tools([w5])
        for message in (chat.invoke("w3"), *chat.stream("w3"), streamed):
            assert message.content == "w1"
            assert [call["name"] for call in message.tool_calls] == ["w5"]
            assert [call["args"] for call in message.invalid_tool_calls] == [broken]

    def test_a_tool_call_nested_without_end_is_invalid(self):
        text, calls, (invalid,) = parse_tool_calls(f"w1 <tool_call>{'[' * 100_000}</tool_call>")
        assert (text, calls) == ("w1", [])
        assert "RecursionError" in invalid["error"]

    def test_a_tool_choice_is_refused(self, caller):
        with pytest.raises(NotImplementedError, match="tool_choice='any'"):
            caller[0].bind_tools([w5], tool_choice="any")
