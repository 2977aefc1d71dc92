"""Memory for chains of `langchain_classic`."""

import pytest
from langchain_classic.chains import LLMChain
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_gradmem import references_of
from langchain_gradmem.memory import GradMemConversationMemory


class TestClassic:
    def test_memory_in_a_chain(self, chat, memory):
        prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{question}")])
        kept = GradMemConversationMemory(memory=memory)
        chain = LLMChain(llm=chat, prompt=prompt, memory=kept)
        for i in range(6):
            chain.invoke({"question": f"w{i}"})
        shown = kept.load_memory_variables({})["history"]
        assert references_of(shown[0])
        assert kept.memory_variables == ["history"]
        assert len(kept.chat_memory.archive) + len(shown) - 1 == 12
        kept.clear()
        assert kept.load_memory_variables({}) == {"history": []}

    async def test_async_methods(self, memory):
        kept = GradMemConversationMemory(memory=memory)
        await kept.asave_context({"question": "w1"}, {"text": "w2"})
        assert [m.content for m in (await kept.aload_memory_variables({}))["history"]] == ["w1", "w2"]
        await kept.aclear()

    def test_a_named_session_over_another_history_can_be_cleared(self, memory):
        kept = GradMemConversationMemory(memory=memory, history=InMemoryChatMessageHistory(), session_id="1")
        for i in range(6):
            kept.save_context({"question": f"w{i}"}, {"text": "w2"})
        assert list(memory.store.yield_keys())
        kept.clear()
        assert list(memory.store.yield_keys()) == []

    def test_several_inputs_need_an_input_key(self, memory):
        kept = GradMemConversationMemory(memory=memory)
        with pytest.raises(ValueError, match="Set input_key"):
            kept.save_context({"a": "w1", "b": "w2"}, {"text": "w3"})
        GradMemConversationMemory(memory=memory, input_key="a").save_context({"a": "w1", "b": "w2"}, {"text": "w3"})
