"""References travel with messages and documents, beside their text."""

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_gradmem import attach, attach_documents, marker, references_of

A, B = "a" * 32, "b" * 32


def test_attached_to_a_copy_and_each_once():
    message = HumanMessage("w1", additional_kwargs={"mine": 1})
    both = attach(attach(message, [A]), [B, A])
    assert references_of(both) == [A, B]
    assert both.additional_kwargs["mine"] == 1
    assert references_of(message) == []


def test_documents_are_attached_to_the_last_human_message():
    messages = [SystemMessage("w0"), HumanMessage("w1"), AIMessage("w2"), HumanMessage("w3"), AIMessage("w4")]
    documents = [Document("w5", metadata={"gradmem": [A]}), Document("w6"), Document("w7", metadata={"gradmem": [B]})]
    found = [references_of(message) for message in attach_documents(messages, documents)]
    assert found == [[], [], [], [A, B], []]
    with pytest.raises(ValueError, match="no human message"):
        attach_documents(messages[:1], documents)


@pytest.mark.parametrize("wrong", ["xyz", 3, ["a" * 31], [marker(A)], None])
def test_what_is_no_reference(wrong):
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        references_of(HumanMessage("w1", additional_kwargs={"gradmem": wrong}))
