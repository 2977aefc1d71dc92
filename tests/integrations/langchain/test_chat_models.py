"""ChatGradMem: common complaints about wrappers of local models, references, security, streams."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, trim_messages
from langchain_gradmem import ChatGradMem, MemoryStateStore, attach, marker
from peft import get_peft_model
from pydantic import ValidationError
from tiny import CHAT_TEMPLATE
from tiny_pipeline import tiny_pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradmem_adapter import (
    GradMemConfig,
    GradMemPipeline,
    MemoryState,
    MemoryStateError,
    UnknownStateError,
    save_checkpoint,
)


@pytest.fixture
def store():
    return MemoryStateStore()


@pytest.fixture
def chat(pipeline, store):
    return ChatGradMem(pipeline=pipeline, store=store, max_tokens=6)


@pytest.fixture
def reference(pipeline, store):
    return store.write(pipeline, ["w1 w2 w3 w4 w5 w6 w7 w8"])[0]


@pytest.fixture
def other(pipeline, store):
    """The reference of another text."""
    return store.write(pipeline, ["w9 w10 w11"])[0]


def plain(pipeline, prompt, memory=None, tokens=6):
    (answer,) = pipeline.generate([[{"role": "user", "content": prompt}]], memory=memory, max_new_tokens=tokens)
    return answer


class TestComplaints:
    def test_the_prompt_is_not_echoed(self, chat, pipeline):
        assert chat.invoke("w3 w4").content == plain(pipeline, "w3 w4")

    def test_an_unknown_option_is_refused(self, pipeline):
        with pytest.raises(ValidationError, match=r"has no option max_token\. Did you mean max_tokens\? help"):
            ChatGradMem(pipeline=pipeline, max_token=4)

    def test_max_tokens_limits_answers_and_streams(self, chat):
        for n in (1, 3):
            message = chat.invoke("w3", max_tokens=n)
            assert message.usage_metadata["output_tokens"] == n
            assert message.response_metadata["finish_reason"] == "length"
            assert sum(1 for c in chat.stream("w3", max_tokens=n) if c.content) <= n

    @pytest.mark.parametrize("words", [1, 2])
    def test_stop_strings_end_answers_and_streams(self, chat, words):
        """Also stop strings that are longer than a token."""
        whole = chat.invoke("w3 w4", max_tokens=8).content.split()
        stop = " ".join(whole[3 : 3 + words])
        expected = " ".join(whole)[: " ".join(whole).find(stop)]
        message = chat.invoke("w3 w4", stop=[stop], max_tokens=8)
        assert message.content == expected
        assert message.response_metadata["finish_reason"] == "stop"
        assert message.usage_metadata["output_tokens"] < 8
        chunks = list(chat.stream("w3 w4", stop=[stop], max_tokens=8))
        assert "".join(c.content for c in chunks) == expected
        assert chunks[-1].response_metadata["finish_reason"] == "stop"

    async def test_async_calls(self, chat):
        expected = chat.invoke("w3").content
        assert (await chat.ainvoke("w3")).content == expected
        assert "".join([c.content async for c in chat.astream("w3")]) == expected
        assert [m.content for m in await chat.abatch(["w3", "w3"])] == [expected] * 2

    def test_a_failed_generate_raises_at_once_in_a_stream(self, chat, pipeline, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("the GPU is gone")

        monkeypatch.setattr(pipeline, "generate_ids", fail)
        with pytest.raises(RuntimeError, match="the GPU is gone"):
            list(chat.stream("w3"))

    def test_usage_is_reported_once(self, chat, reference):
        message = chat.bind(memory=reference).invoke("w3")
        usage = message.usage_metadata
        without = chat.invoke("w3").usage_metadata
        assert usage["input_tokens"] == without["input_tokens"] + 3
        assert without["input_token_details"] == {"memory_vectors": 0, "memory_saved": 0}
        assert usage["input_token_details"] == {"memory_vectors": 3, "memory_saved": 8 - 3}
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert message.response_metadata["model_name"] == "gradmem"
        chunks = list(chat.bind(memory=reference).stream("w3"))
        assert [c.usage_metadata for c in chunks if c.usage_metadata] == [usage]
        assert chunks[-1].chunk_position == "last"


class TestReferences:
    def test_references_can_be_bound_or_attached(self, chat, pipeline, store, reference):
        expected = plain(pipeline, "w3", store.get(reference))
        assert chat.bind(memory=reference).invoke("w3").content == expected
        assert chat.invoke([attach(HumanMessage("w3"), [reference])]).content == expected
        assert expected != plain(pipeline, "w3")

    def test_the_marker_of_an_attached_reference_is_not_read_as_text(self, chat, reference):
        shown = attach(HumanMessage(f"w3{marker(reference)}"), [reference])
        assert chat.invoke([shown]).content == chat.bind(memory=reference).invoke("w3").content

    @pytest.mark.parametrize("kind", [HumanMessage, AIMessage, SystemMessage])
    def test_markers_in_texts_are_never_resolved(self, chat, pipeline, reference, kind, monkeypatch):
        """Typed by a user, echoed by a model, or part of a retrieved text."""
        seen = []
        generate = pipeline.generate_ids
        monkeypatch.setattr(pipeline, "generate_ids", lambda *a, **k: seen.append(k["memory"]) or generate(*a, **k))
        with pytest.warns(UserWarning, match=r"marker of a memory state that no message carries.*MessagesPlaceholder"):
            chat.invoke([kind(f"w1 {marker(reference)}"), HumanMessage("w3")])
        assert seen == [None]

    @pytest.mark.filterwarnings("error")
    def test_other_markers_are_plain_text(self, chat, reference):
        """Those of states that the store does not hold, or that another message carries."""
        chat.invoke(f"w1 {marker('f' * 32)}")
        carried = chat.invoke([SystemMessage(f"w1 {marker(reference)}"), attach(HumanMessage("w3"), [reference])])
        bare = chat.invoke([SystemMessage("w1"), attach(HumanMessage("w3"), [reference])])
        assert carried.content == bare.content
        assert carried.usage_metadata == bare.usage_metadata, "stripped wherever it stands"

    def test_several_states_are_read_side_by_side(self, chat, reference, other):
        usage = chat.invoke("w3", memory=[reference, other]).usage_metadata
        assert usage["input_token_details"] == {"memory_vectors": 6, "memory_saved": 11 - 6}
        limited = chat.model_copy(update={"max_states": 1})
        with pytest.raises(ValueError, match=r"2 memory states, but at most 1.*retrieve fewer"):
            limited.invoke("w3", memory=[reference, other])

    def test_of_too_many_states_those_of_the_last_turn_come_first(self, chat, pipeline, store):
        a, b, c, d, e = store.write(pipeline, [f"w{i} w{i + 1}" for i in range(5)])
        messages = [
            attach(SystemMessage("w0"), [a, b]), attach(HumanMessage("w1"), [c]), AIMessage("w2"),
            attach(HumanMessage("w3"), [d, e]),
        ]  # fmt: skip
        expected = {2: [d, e], 3: [c, d, e], 4: [b, c, d, e], 1: [d]}
        for most, references in expected.items():
            limited = chat.model_copy(update={"max_states": most})
            with pytest.warns(UserWarning, match=r"refer to 5 memory states, more than max_states: \d are left out"):
                memory = limited._ask(messages, None, {}).call.memory
            assert memory == MemoryState.concat([store.get(reference) for reference in references])

    def test_a_lost_state_of_an_earlier_message_is_left_out(self, chat, reference, other):
        messages = [attach(HumanMessage("w1"), [other]), AIMessage("w2"), attach(HumanMessage("w3"), [reference])]
        chat.store.mdelete([other])
        with pytest.warns(UserWarning, match="Only an earlier message refers to this state, so it is left out"):
            assert chat._ask(messages, None, {}).call.memory == chat.store.get(reference)
        for needed in (messages[:1], [attach(SystemMessage("w0"), [other]), HumanMessage("w1")]):
            with pytest.raises(UnknownStateError):
                chat.invoke(needed)

    @pytest.mark.parametrize(
        "earlier", [[], [HumanMessage("w1"), AIMessage("w2")], [SystemMessage("w1")]], ids=["alone", "turn", "system"]
    )
    def test_an_empty_question_is_refused(self, chat, reference, earlier):
        for empty in (HumanMessage(""), HumanMessage(" \n"), attach(HumanMessage(marker(reference)), [reference])):
            with pytest.raises(ValueError, match="The last human message is empty"):
                chat.invoke([*earlier, empty])
        with pytest.raises(ValueError, match="The last human message is empty"):
            next(chat.stream([*earlier, HumanMessage("")]))
        assert chat.invoke([*earlier, HumanMessage("w1"), HumanMessage("")]).text  # the question came before

    def test_unknown_references_raise(self, chat):
        with pytest.raises(UnknownStateError, match=r"no memory state 'f{32}' in '/"):
            chat.invoke("w3", memory="f" * 32)
        for wrong in ("xyz", 3, ["a" * 31]):
            with pytest.raises(ValueError, match="32 hexadecimal digits"):
                chat.invoke("w3", memory=wrong)

    def test_tenants_cannot_read_each_other(self, pipeline, store, reference):
        tenant = MemoryStateStore(store.store, namespace="tenant")
        with pytest.raises(UnknownStateError):
            ChatGradMem(pipeline=pipeline, store=tenant).invoke("w3", memory=reference)
        tenant.write(pipeline, ["w1 w2 w3 w4 w5 w6 w7 w8"])
        assert tenant.store.path != store.store.path
        assert list(store.yield_keys()) == [reference]

    def test_states_of_another_model_are_refused(self, store, reference):
        stranger = ChatGradMem(pipeline=tiny_pipeline(seed=5), store=store)
        with pytest.raises(MemoryStateError, match="written by model"):
            stranger.invoke("w3", memory=reference)


class TestOptions:
    def test_unexpected_arguments_are_refused(self, chat):
        with pytest.raises(TypeError, match="max_token"):
            chat.invoke("w3", max_token=3)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("max_tokens", value) for value in (0, 2.5, "5", True)]
        + [("temperature", value) for value in (-1, "0.5", True, float("nan"), float("inf"))]
        + [("top_p", value) for value in (0.0, 5, float("nan"))]
        + [("seed", value) for value in ("x", 2**70)]
        + [("stop", "w"), ("stop", [5]), ("chat_template_kwargs", "x")],
    )
    def test_values_out_of_bounds_are_refused_by_name(self, chat, name, value):
        for ask in (chat.invoke, lambda *args, **kwargs: list(chat.stream(*args, **kwargs))):
            with pytest.raises(ValueError, match=f"for ChatGradMem\n{name}"):
                ask("w3", **{name: value})
        with pytest.raises(ValidationError, match=name):
            ChatGradMem(pipeline=chat.pipeline, **{name: value})

    @pytest.mark.parametrize("temperature", [0, 1e-45, 1e-12])
    def test_a_tiny_temperature_is_greedy(self, chat, temperature):
        assert chat.invoke("w3", temperature=temperature, top_p=1).content == chat.invoke("w3").content

    def test_sampling_is_seeded_and_leaves_the_global_generator_alone(self, chat):
        options = {"temperature": 2.0, "top_p": 0.9, "max_tokens": 8}
        state = torch.get_rng_state()
        first, same, other = (chat.invoke("w3", seed=seed, **options).content for seed in (1, 1, 2))
        assert first == same != other
        assert torch.equal(torch.get_rng_state(), state)


class TestConcurrency:
    def test_threads_get_answers_from_their_own_memory(self, chat, reference, other):
        expected = {r: chat.invoke("w3", memory=r).content for r in (reference, other)}
        wrong = []

        def work(r):
            for _ in range(5):
                if chat.invoke("w3", memory=r).content != expected[r]:
                    wrong.append(r)

        threads = [threading.Thread(target=work, args=(r,)) for r in (reference, other) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    async def test_concurrent_tasks_get_the_same_answer(self, chat, reference):
        expected = chat.invoke("w3", memory=reference).content
        answers = await asyncio.gather(*(chat.ainvoke("w3", memory=reference) for _ in range(4)))
        assert [a.content for a in answers] == [expected] * 4


class TestTokens:
    def test_tokens_of_a_text_are_counted(self, chat):
        assert chat.get_num_tokens("w1 w2 w3") == 3

    def test_markers_of_messages_are_not_counted(self, chat, reference):
        one = chat.get_num_tokens_from_messages([HumanMessage("w1 w2")])
        assert one == chat.invoke("w1 w2").usage_metadata["input_tokens"]
        carried = attach(HumanMessage(f"w1 w2 {marker(reference)}"), [reference])
        assert chat.get_num_tokens_from_messages([carried]) == one

    def test_trim_messages_can_count_with_the_model(self, chat):
        messages = [HumanMessage("w1 " * 50) for _ in range(9)]
        assert len(trim_messages(messages, max_tokens=120, token_counter=chat, strategy="last")) == 2

    def test_messages_that_the_template_refuses_are_counted_as_text(self, chat, monkeypatch):
        refusing = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}w1"
        monkeypatch.setattr(chat.pipeline.tokenizer, "chat_template", refusing)
        assert chat.get_num_tokens_from_messages([AIMessage("w1 w2"), HumanMessage("w3")]) == 3


def test_chat_template_kwargs_reach_the_template(chat, pipeline, monkeypatch):
    thinking = "{% if not enable_thinking | default(true) %}w9 {% endif %}" + pipeline.tokenizer.chat_template
    monkeypatch.setattr(pipeline.tokenizer, "chat_template", thinking)
    plainly = {"enable_thinking": False}
    messages = [{"role": "user", "content": "w3"}]
    (expected,) = pipeline.generate([messages], chat_template_kwargs=plainly, max_new_tokens=6)
    assert chat.bind(chat_template_kwargs=plainly).invoke("w3").content == expected
    assert chat.model_copy(update={"chat_template_kwargs": plainly}).invoke("w3").content == expected
    tokens = [chat.invoke("w3", chat_template_kwargs=k).usage_metadata["input_tokens"] for k in (plainly, None)]
    assert tokens[0] == tokens[1] + 1


def test_the_error_for_a_long_prompt_gives_its_length(chat):
    used = chat.invoke("w1").usage_metadata["input_tokens"] - 1
    with pytest.raises(ValueError, match=rf"has {180 + used} tokens after 0 memory vectors.*160 positions"):
        chat.invoke("w1 " * 180)


def test_an_answer_stops_at_the_last_position(chat):
    usage = chat.invoke("w1 " * 140, max_tokens=200).usage_metadata
    assert usage["total_tokens"] == 160


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda chat: chat.model_copy(deep=True), lambda chat: pickle.loads(pickle.dumps(chat))]
)
def test_copies_share_nothing_but_the_directory_of_states(chat, reference, copied):
    same = copied(chat)
    assert same.invoke("w3", memory=reference).content == chat.invoke("w3", memory=reference).content
    assert same.pipeline.model is not chat.pipeline.model
    assert same.store.write(same.pipeline, "w1 w2") == chat.store.write(chat.pipeline, "w1 w2")
    assert (same.store.writes, chat.store.writes) == (1, 1)


def test_from_checkpoint_opens_the_same_model(llama_directory, tmp_path):
    backbone = AutoModelForCausalLM.from_pretrained(llama_directory)
    tokenizer = AutoTokenizer.from_pretrained(llama_directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=3)).eval()
    save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    expected = ChatGradMem(pipeline=GradMemPipeline(model, tokenizer), max_tokens=4).invoke("the heron").content
    chat = ChatGradMem.from_checkpoint(tmp_path / "checkpoint", max_tokens=4)
    assert chat.invoke("the heron").content == expected


class TestSeveralStates:
    """An adapter that was trained to refuse is asked which state holds the answer, and reads only that one."""

    @pytest.fixture
    def refusing(self):
        return ChatGradMem(pipeline=tiny_pipeline(refusal="w50 w51"), max_tokens=6)

    @pytest.fixture
    def references(self, refusing):
        return refusing.store.write(refusing.pipeline, ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"])

    def test_the_state_that_holds_the_answer_is_read(self, refusing, references):
        supported = refusing.pipeline.support(
            [{"role": "user", "content": "w20"}], memory=MemoryState.stack([*map(refusing.store.get, references)])
        )
        best = references[supported.index(max(supported))]
        answer = refusing.invoke("w20", memory=references)
        assert answer.text == refusing.invoke("w20", memory=best).text
        saved = int(refusing.store.get(best).context_tokens) - 3
        assert answer.usage_metadata["input_token_details"] == {"memory_vectors": 3, "memory_saved": saved}
        assert "".join(chunk.text for chunk in refusing.stream("w20", memory=references)) == answer.text
        assert answer.response_metadata["gradmem"] == [best]
        *_, last = refusing.stream("w20", memory=references)
        assert last.response_metadata["gradmem"] == [best]
        for said in (answer, last):
            assert said.response_metadata["gradmem_support"] == pytest.approx(max(supported), rel=1e-4)
        for few in ({}, {"memory": best}):
            assert refusing.invoke("w4", **few).response_metadata["gradmem_support"] is None
        assert refusing.invoke("w4").response_metadata["gradmem"] == []

    def test_words_of_the_question_also_count(self, refusing, references):
        """As for `gradmem ask` and the server. Untrained, no state supports an answer much more than another."""
        for word, reference in zip(("w2", "w5", "w8"), references, strict=True):
            earlier = [HumanMessage("w1 w4 w6"), AIMessage("w1")]
            answer = refusing.invoke([*earlier, attach(HumanMessage(word), references)])
            assert answer.response_metadata["gradmem"] == [reference]

    def test_states_without_texts_are_compared_by_support_alone(self, refusing, references):
        """They were put, or written by a store that keeps no texts."""
        bare = MemoryStateStore()
        bare.mset([(reference, refusing.store.get(reference)) for reference in references])
        chat = refusing.model_copy(update={"store": bare})
        expected = refusing.invoke("w20", memory=references)
        assert chat.invoke("w20", memory=references).response_metadata == expected.response_metadata

    def test_all_states_are_read_on_request(self, refusing, references):
        chat = refusing.model_copy(update={"side_by_side": True})
        answer = chat.invoke("w4", memory=references)
        assert answer.usage_metadata["input_token_details"] == {"memory_vectors": 9, "memory_saved": 3 + 2 + 4 - 9}
        assert answer.response_metadata["gradmem"] == list(references)

    def test_an_adapter_that_never_refuses_reads_all_states(self, chat, reference, other):
        details = chat.invoke("w3", memory=[reference, other]).usage_metadata["input_token_details"]
        assert details["memory_vectors"] == 6
        with pytest.raises(ValueError, match="not trained to refuse"):
            chat.model_copy(update={"side_by_side": False}).invoke("w3", memory=[reference, other])


class TestCached:
    """A cache of answers never returns the answer of another configuration."""

    OTHERS = {
        "chat_template_kwargs": {"x": 1}, "max_states": 1, "max_tokens": 5, "model_name": "other",
        "output_version": "v1", "seed": 1, "side_by_side": True, "stop": ["w1"], "store": MemoryStateStore(),
        "temperature": 1.0, "top_p": 0.5,
    }  # fmt: skip
    """A value of each field that changes an answer."""
    SAME = {
        "cache": True, "callbacks": [], "custom_get_token_ids": len, "disable_streaming": True, "max_batch": 2,
        "metadata": {"x": 1}, "name": "chat", "profile": {}, "rate_limiter": None, "streaming": True, "tags": ["x"],
        "verbose": True,
    }  # fmt: skip

    @staticmethod
    def key(chat, **changed):
        """The cache key of a call that names arguments without values."""
        call = {"stop": None} | dict.fromkeys(changed)
        return chat.model_copy(update=changed)._get_llm_string(**call)

    def test_every_field_is_named_here(self):
        assert {*self.OTHERS, *self.SAME, "pipeline"} == {*ChatGradMem.model_fields}

    @pytest.mark.parametrize("field", OTHERS)
    def test_fields_that_change_an_answer_change_the_key(self, chat, field):
        assert self.key(chat, **{field: getattr(chat, field)}) != self.key(chat, **{field: self.OTHERS[field]})

    @pytest.mark.parametrize("field", SAME)
    def test_other_fields_do_not_change_the_key(self, chat, field):
        assert self.key(chat, **{field: getattr(chat, field)}) == self.key(chat, **{field: self.SAME[field]})

    def test_the_key_depends_on_the_pipeline(self, chat, pipeline):
        others = [tiny_pipeline() for _ in range(3)]
        others[0].tokenizer.chat_template += " "
        others[1].model.generation_config.repetition_penalty = 2.0
        others += [
            tiny_pipeline(seed=5),
            tiny_pipeline(refusal="w50"),
            GradMemPipeline(pipeline.model, pipeline.tokenizer),
        ]
        same = [self.key(chat, pipeline=other) == self.key(chat, pipeline=pipeline) for other in others]
        assert same == [False, False, True, False, False, True]

    def test_answers_of_different_settings_are_cached_separately(self):
        pipeline, cache = tiny_pipeline(refusal="w50 w51"), InMemoryCache()
        chat = ChatGradMem(pipeline=pipeline, cache=cache, max_tokens=6)
        references = chat.store.write(pipeline, ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"])
        question = [attach(HumanMessage("w4"), references)]
        assert len(chat.invoke(question).response_metadata["gradmem"]) == 1
        whole = chat.model_copy(update={"side_by_side": True})
        assert whole.invoke(question).response_metadata["gradmem"] == references
        with pytest.warns(UserWarning, match="more than max_states"):
            one = whole.model_copy(update={"max_states": 1}).invoke(question)
        assert one.response_metadata["gradmem"] == references[:1]
        assert len(cache._cache) == 3
