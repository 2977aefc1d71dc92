"""References travel with messages and documents, beside their text."""

import uuid

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompt_values import ChatPromptValue, StringPromptValue
from langchain_gradmem import attach, attach_documents, marker, references_of

A, B = "a" * 32, "b" * 32


def test_references_are_attached_once_to_a_copy():
    message = HumanMessage("w1", additional_kwargs={"mine": 1})
    both = attach(attach(message, [A]), [B, A])
    assert references_of(both) == [A, B]
    assert both.additional_kwargs["mine"] == 1
    assert references_of(message) == []


def test_one_reference_can_be_attached_by_itself():
    assert references_of(attach(HumanMessage("w1"), A)) == [A]
    with pytest.raises(ValueError, match=r"32 hexadecimal digits.*got \['xyz'\]"):
        attach(HumanMessage("w1"), "xyz")


def test_documents_are_attached_to_the_last_human_message():
    messages = [SystemMessage("w0"), HumanMessage("w1"), AIMessage("w2"), HumanMessage("w3"), AIMessage("w4")]
    documents = [Document("w5", metadata={"gradmem": f"{A} {B}"}), Document("w7", metadata={"gradmem": B})]
    found = [references_of(message) for message in attach_documents(messages, documents)]
    assert found == [[], [], [], [A, B], []]
    with pytest.raises(ValueError, match="no human message"):
        attach_documents(messages[:1], documents)


def test_documents_can_be_attached_to_any_prompt_value():
    documents = [Document("w5", metadata={"gradmem": A})]
    for value in ("w1", StringPromptValue(text="w1"), ChatPromptValue(messages=[HumanMessage("w1")])):
        (message,) = attach_documents(value, documents)
        assert (message.content, references_of(message)) == ("w1", [A])


def test_a_plain_document_gives_a_warning():
    with pytest.warns(UserWarning, match="carries no reference"):
        attach_documents("w1", [Document("w2")])


@pytest.mark.parametrize("foreign", ["yes", "", 3, None, ["a" * 32], {"a": 1}, f"{A}, {B}", marker(A)])
def test_other_values_in_metadata_are_ignored(foreign):
    assert references_of(Document("w1", metadata={"gradmem": foreign})) == []


@pytest.mark.parametrize("wrong", ["xyz", 3, ["a" * 31], [marker(A)], None])
def test_invalid_references_are_refused(wrong):
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        references_of(HumanMessage("w1", additional_kwargs={"gradmem": wrong}))


def test_the_error_for_a_state_says_how_to_get_a_reference(chat):
    state = chat.pipeline.write("w1 w2 w3")
    for wrong in (state, [state]):
        with pytest.raises(ValueError, match=r"got .*MemoryState.* store\.mset\(\[\(reference, state\)\]\)"):
            chat.bind(memory=wrong).invoke("w1")
    with pytest.raises(ValueError, match=r"got 3\.$"):
        chat.invoke("w1", memory=3)
    reference = uuid.uuid4().hex
    chat.store.mset([(reference, state)])
    assert chat._ask([HumanMessage("w1")], None, {"memory": reference}).call.memory == chat.store.get(reference)
