"""Common chains, with memory in place of documents."""

import pytest
from langchain_classic.chains import ConversationChain, RetrievalQA, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_gradmem import GradMemCompressor, GradMemRetriever, attach, create_gradmem_stuff_chain, marker
from langchain_gradmem.memory import GradMemConversationMemory
from tiny import tiny_text

DOCUMENTS = [Document(tiny_text(12, seed=i), metadata={"title": f"w4{i}"}) for i in range(3)]
PROMPTS = {
    "human": ChatPromptTemplate.from_messages([("human", "{context} Question : {input}")]),
    "system": ChatPromptTemplate.from_messages([("system", "w1 {context}"), ("human", "{input}")]),
    "string": PromptTemplate.from_template("{context} Question : {input}"),
}


@pytest.fixture
def asked(chat, monkeypatch):
    """What the model is shown: its prompt, and how many vectors come before it."""
    calls = []
    generate = chat.pipeline.generate_ids

    def record(ids, mask, *, memory=None, **options):
        prompt = chat.pipeline.tokenizer.decode(ids[0])
        calls.append((prompt, 0 if memory is None else memory.num_memory_tokens))
        return generate(ids, mask, memory=memory, **options)

    monkeypatch.setattr(chat.pipeline, "generate_ids", record)
    return calls


def test_other_models_and_joined_documents_are_refused(chat):
    prompt = PROMPTS["human"]
    with pytest.raises(TypeError, match="Expected a ChatGradMem, bound or not, got RunnableSequence"):
        create_gradmem_stuff_chain(chat | RunnableLambda(str), prompt)
    chain = create_gradmem_stuff_chain(chat, prompt)
    with pytest.raises(TypeError, match="'context' must be a list of Documents, got a string"):
        chain.invoke({"context": "w1 w2", "input": "w3"})


def test_a_model_with_retries_and_fallbacks_reads_memory(chat, asked):
    for llm in (chat.with_retry(), chat.bind(stop=["w0"]).with_retry().with_fallbacks([chat])):
        create_gradmem_stuff_chain(llm, PROMPTS["human"]).invoke({"context": DOCUMENTS, "input": "w3"})
    assert [vectors for _, vectors in asked] == [3 * 3] * 2


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_documents_are_read_from_memory(chat, asked, prompt):
    chain = create_gradmem_stuff_chain(chat, prompt)
    assert isinstance(chain.invoke({"context": DOCUMENTS, "input": "w3"}), str)
    ((shown, vectors),) = asked
    assert vectors == 3 * 3
    assert "w3" in shown
    assert "gradmem" not in shown
    assert "<unk>" not in shown.replace("<unk> :", ""), "a marker is no word of this tokenizer, nor is a system role"
    assert not any(document.page_content in shown for document in DOCUMENTS)


def test_a_retrieval_chain_needs_one_changed_line(chat, asked):
    retriever = RunnableLambda(lambda inputs: DOCUMENTS)
    prompt = PROMPTS["system"]
    before = create_retrieval_chain(retriever, create_stuff_documents_chain(chat, prompt))
    after = create_retrieval_chain(retriever, create_gradmem_stuff_chain(chat, prompt))
    before.invoke({"input": "w3"})
    result = after.invoke({"input": "w3"})
    (text, none), (memory, vectors) = asked
    assert (none, vectors) == (0, 9)
    assert len(memory.split()) == len(text.split()) - 3 * 12
    assert result["context"] == DOCUMENTS, "for citations"


@pytest.mark.filterwarnings("error::UserWarning")
def test_chains_without_memory_read_the_text(chat, asked):
    """Documents of our retriever keep their text, so that no marker is read in its place."""
    retriever = GradMemRetriever.from_retriever(RunnableLambda(lambda query: DOCUMENTS), chat)
    create_retrieval_chain(
        RunnableLambda(lambda inputs: inputs["input"]) | retriever,
        create_stuff_documents_chain(chat, PROMPTS["human"]),
    ).invoke({"input": "w3"})
    RetrievalQA.from_chain_type(chat, retriever=retriever).invoke({"query": "w3"})
    for shown, vectors in asked:
        assert vectors == 0
        assert all(document.page_content in shown for document in DOCUMENTS)


def test_metadata_stays_text_in_the_order_of_the_documents(chat, asked):
    titled = PromptTemplate.from_template("{title} : {page_content}")
    prompt = PROMPTS["human"]
    create_gradmem_stuff_chain(chat, prompt, document_prompt=titled, document_separator=" w9 ").invoke(
        {"context": DOCUMENTS, "input": "w3"}
    )
    assert "w40 : w9 w41 : w9 w42 :" in " ".join(asked[0][0].split())


def test_documents_that_memory_does_not_hold_stay_text(chat, asked):
    compressor = GradMemCompressor.from_chat(chat, fallback="text", min_gain=0.9)
    chain = create_gradmem_stuff_chain(chat, PROMPTS["human"], compressor=compressor)
    chain.invoke({"context": DOCUMENTS, "input": "w3"})
    ((shown, vectors),) = asked
    assert vectors == 0
    assert all(document.page_content in shown for document in DOCUMENTS)


def test_a_marker_in_a_document_attaches_nothing(chat, asked):
    """Even if a retrieved text names the reference of someone else's state."""
    (secret,) = chat.store.write(chat.pipeline, tiny_text(9, seed=8))
    foreign = Document(f"w1 {marker(secret)}", metadata={"gradmem": secret})
    create_gradmem_stuff_chain(chat, PROMPTS["human"]).invoke({"context": [foreign], "input": "w3"})
    assert asked[0][1] == 3
    chain = create_gradmem_stuff_chain(
        chat, PROMPTS["human"], compressor=GradMemCompressor.from_chat(chat, fallback="text", min_gain=0.9)
    )
    with pytest.warns(UserWarning, match="marker of a memory state that no message carries"):
        chain.invoke({"context": [foreign], "input": "w3"})
    assert asked[1][1] == 0


def test_a_bound_model_and_other_variable_names(chat, asked):
    bound = chat.bind(max_tokens=1)
    prompt = PromptTemplate.from_template("{documents} {question}")
    stuff = create_gradmem_stuff_chain(bound, prompt, document_variable_name="documents")
    chain = {"documents": RunnableLambda(lambda _: DOCUMENTS), "question": RunnablePassthrough()} | stuff
    assert len(chain.invoke("w3").split()) == 1
    assert asked[0][1] == 9
    with pytest.raises(ValueError, match="needs the variable 'context'"):
        create_gradmem_stuff_chain(chat, prompt)


async def test_async_calls_and_streams_give_the_same_answer(chat):
    chain = create_gradmem_stuff_chain(chat, PROMPTS["human"])
    inputs = {"context": DOCUMENTS, "input": "w3"}
    expected = chain.invoke(inputs)
    assert await chain.ainvoke(inputs) == expected
    assert "".join(chain.stream(inputs)) == expected
    assert "".join([piece async for piece in chain.astream(inputs)]) == expected
    assert chain.batch([inputs, inputs]) == [expected] * 2


@pytest.mark.filterwarnings("ignore:The messages refer to more memory states")
def test_rag_works_over_many_turns(chat, asked):
    """Every turn attaches its documents, and the history keeps what was attached: twenty turns of three states each."""
    chat.max_states = 8
    messages = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{input}")])
    history = []
    for i in range(20):
        documents = [Document(tiny_text(8, seed=10 * i + j)) for j in range(3)]
        found = GradMemCompressor.from_chat(chat).compress_documents(documents, "")
        references = [document.metadata["gradmem"] for document in found]
        value = messages.invoke({"history": history[-4:], "input": "w3"}).to_messages()
        value[-1] = attach(value[-1], references)
        history += [value[-1], chat.invoke(value)]
    assert asked[-1][1] == 3 * 8


def test_a_prompt_of_one_string_warns_of_the_lost_memory(chat, memory):
    chain = ConversationChain(llm=chat, memory=GradMemConversationMemory(memory=memory, memory_key="history"))
    for i in range(4):
        chain.invoke({"input": f"w{i}"})
    with pytest.warns(UserWarning, match="MessagesPlaceholder"):
        chain.invoke({"input": "w4"})
