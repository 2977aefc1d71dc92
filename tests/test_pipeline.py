"""Texts in, texts out: the pipeline equals tokenizer and model by hand, alone, in batches, in streams and threads."""

import inspect
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny, tiny_text, tiny_tokenizer
from transformers import StoppingCriteria

from gradmem_adapter import GradMemConfig, GradMemModel, GradMemPipeline, MemoryState, WriteOptions
from gradmem_adapter.write.options import WriteFields

CONTEXTS = [tiny_text(9, 1), tiny_text(5, 2), tiny_text(12, 3)]
PROMPTS = [tiny_text(6, 4), tiny_text(2, 5), tiny_text(4, 6)]
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}, {"role": "user", "content": "w4"}]


def make(*, bos=False, tokenizer=None, **config):
    backbone = tiny()
    scale = float(backbone.get_input_embeddings()(torch.arange(3, 20)).detach().std())
    defaults = {"num_memory_tokens": 3, "write_lr": 0.3, "num_control_tokens": 1, "memory_init_std": scale}
    model = get_peft_model(backbone, GradMemConfig(**defaults | config)).eval()
    return GradMemPipeline(model, tokenizer or tiny_tokenizer(bos=bos))


@pytest.fixture
def pipeline():
    return make()


def by_hand(pipeline, prompt, state, special=True, count=8):
    """One prompt through tokenizer and model.generate."""
    ids = pipeline.tokenizer(prompt, return_tensors="pt", add_special_tokens=special)["input_ids"]
    output = pipeline.model.generate(
        input_ids=ids, memory=state, max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return pipeline.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def answer(pipeline, prompts, memory=None, **options):
    defaults = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    return pipeline.generate(prompts, memory=memory, **defaults | options)


class TestWrite:
    @pytest.mark.parametrize("bos", [False, True])
    def test_write_equals_that_of_the_model(self, bos):
        pipeline = make(bos=bos)
        state = pipeline.write(CONTEXTS, steps=3, lr=0.1)
        encoded = pipeline.tokenizer(CONTEXTS, return_tensors="pt", padding=True, padding_side="right")
        assert state.equal(pipeline.model.write(**encoded, steps=3, lr=0.1))
        assert state.context_tokens.tolist() == [9 + bos, 5 + bos, 12 + bos]
        assert state.write_losses.shape == (3, 4)

    def test_one_text_is_a_batch_of_one(self, pipeline):
        state = pipeline.write(CONTEXTS[0])
        ids = pipeline.tokenizer(CONTEXTS[0], return_tensors="pt")["input_ids"]
        assert len(state) == 1
        assert state.equal(pipeline.model.write(ids))
        assert state.equal(pipeline.write((CONTEXTS[0],)))

    def test_write_continues_from_a_state(self, pipeline):
        first = pipeline.write(CONTEXTS, steps=2)
        second = pipeline.write(CONTEXTS, steps=1, initial=first)
        torch.testing.assert_close(second.vectors, pipeline.write(CONTEXTS, steps=3).vectors)

    def test_write_takes_the_same_arguments_as_the_models(self):
        """Same names, same defaults, and every field of WriteOptions among them."""

        def keywords(method, *without):
            parameters = inspect.signature(method).parameters.values()
            return {p.name: p.default for p in parameters if p.name not in ("self", *without)}

        tokens = ("input_ids", "attention_mask", "token_type_ids")
        assert keywords(GradMemPipeline.write, "texts") == keywords(GradMemModel.write, *tokens)
        assert keywords(GradMemPipeline.write_many, "texts") == keywords(GradMemModel.write_many, "contexts")
        assert {field.name for field in fields(WriteOptions)} == WriteFields.__annotations__.keys()

    def test_options_can_be_one_object(self, pipeline):
        options = WriteOptions(steps=3, lr=0.1)
        state = pipeline.write(CONTEXTS, steps=3, lr=0.1)
        assert pipeline.write(CONTEXTS, options=options).equal(state)
        assert pipeline.write_many(CONTEXTS, options=options).write_losses.shape == (3, 4)
        assert pipeline.write(CONTEXTS, options=options, steps=1).write_losses.shape == (3, 2)

    def test_the_longest_text_is_written(self, pipeline):
        assert pipeline.max_context_tokens == 91
        assert len(pipeline.write(tiny_text(91), steps=0)) == 1

    def test_half_a_character_is_named(self, pipeline):
        """As texts from broken PDFs may have."""
        state = pipeline.write("w1 w2")
        for call in (pipeline.write, pipeline.write_many, lambda texts: pipeline.fidelity(texts, state)):
            with pytest.raises(ValueError, match=r"Context 1 has half a character .*, '\\ud83d', at position 3"):
                call(["w1 w2", "w1 \ud83d w2"])
        with pytest.raises(ValueError, match="Context 0 has a zero byte at position 2"):
            pipeline.write("w1\0w2")
        with pytest.raises(ValueError, match="Prompt 0 has half a character"):
            pipeline.generate("w1 \ud83d", memory=state)

    def test_empty_and_invalid_inputs_are_refused(self, pipeline):
        with pytest.raises(ValueError, match="no text to write"):
            pipeline.write([])
        with pytest.raises(ValueError, match="Context 0 is empty"):
            pipeline.write("")
        with pytest.raises(ValueError, match="Context 1 is empty"):
            pipeline.write([CONTEXTS[0], " "])
        with pytest.raises(TypeError, match="list of texts, got NoneType"):
            pipeline.write(None)
        with pytest.raises(TypeError, match="text 0 is a int"):
            pipeline.write([1, 2])
        with pytest.raises(TypeError, match=r"must be a text, a list of chat messages.* got NoneType"):
            pipeline.generate(None)
        with pytest.raises(TypeError, match="Expected memory states to stack, got int"):
            MemoryState.stack([1])

    def test_a_text_that_is_too_long_is_refused(self, pipeline):
        with pytest.raises(ValueError, match="Context 0 has 120 tokens, but at most 91 are allowed"):
            pipeline.write(tiny_text(120))

    def test_fidelity_and_reconstruct_equal_those_of_the_model(self):
        pipeline = make(memory_init="vocab", write_optimizer="adam", num_memory_tokens=6)
        contexts = ["w1 w1 w1 w1 w1 w1", "w2 w2 w2", CONTEXTS[0]]
        state = pipeline.write(contexts, steps=100, lr=0.1, stop_when_recovered=True)
        fidelity = pipeline.fidelity(contexts, state)
        encoded = pipeline.tokenizer(contexts, return_tensors="pt", padding=True, padding_side="right")
        expected = pipeline.model.fidelity(state, **encoded)
        assert torch.equal(fidelity.greedy, expected.greedy)
        assert torch.equal(fidelity.teacher_forced, expected.teacher_forced)
        texts = pipeline.reconstruct(state)
        assert len(texts) == 3
        for share, text, context in zip(fidelity.greedy, texts, contexts, strict=True):
            assert (text == context) == (share == 1)
        assert fidelity.greedy.max() == 1  # otherwise the comparison above shows nothing


class TestGenerate:
    @pytest.mark.parametrize("bos", [False, True])
    def test_generate_equals_that_of_the_model(self, bos):
        pipeline = make(bos=bos)
        states = pipeline.write(CONTEXTS)
        expected = [by_hand(pipeline, prompt, state) for prompt, state in zip(PROMPTS, states, strict=True)]
        assert answer(pipeline, PROMPTS, states) == expected
        assert [answer(pipeline, prompt, state)[0] for prompt, state in zip(PROMPTS, states, strict=True)] == expected
        assert all(expected)
        assert not any(text.startswith(prompt) for text, prompt in zip(expected, PROMPTS, strict=True))
        assert expected != answer(pipeline, PROMPTS)

    def test_one_prompt_and_no_prompt_give_lists(self, pipeline):
        state = pipeline.write(CONTEXTS[0])
        single = answer(pipeline, PROMPTS[0], state)
        assert single == answer(pipeline, [PROMPTS[0]], state) == answer(pipeline, (PROMPTS[0],), state)
        assert isinstance(single, list)
        assert len(single) == 1
        assert answer(pipeline, [], state) == []

    def test_without_memory_it_is_the_backbone(self, pipeline):
        backbone = tiny()
        for prompt in PROMPTS:
            ids = pipeline.tokenizer(prompt, return_tensors="pt")["input_ids"]
            output = backbone.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            expected = pipeline.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            assert answer(pipeline, prompt) == [expected]

    def test_one_state_for_all_prompts(self, pipeline):
        state = pipeline.write(CONTEXTS[0])
        assert answer(pipeline, PROMPTS, state) == [by_hand(pipeline, prompt, state) for prompt in PROMPTS]

    def test_context_index_chooses_states(self, pipeline):
        states = pipeline.write(CONTEXTS)
        index = [2, 0, 2]
        expected = [by_hand(pipeline, prompt, states[i]) for prompt, i in zip(PROMPTS, index, strict=True)]
        assert answer(pipeline, PROMPTS, states, context_index=torch.tensor(index)) == expected
        assert answer(pipeline, PROMPTS, states, context_index=index) == expected

    def test_states_that_do_not_fit_are_refused(self, pipeline):
        with pytest.raises(ValueError, match="3 queries for 2 memory states"):
            answer(pipeline, PROMPTS, pipeline.write(CONTEXTS[:2]))
        state = make(num_memory_tokens=4).write(CONTEXTS[0])
        with pytest.raises(ValueError, match="was written by model"):
            answer(pipeline, PROMPTS[0], state)

    def test_stop_strings_end_an_answer(self, pipeline):
        state = pipeline.write(CONTEXTS[0])
        (whole,) = answer(pipeline, PROMPTS[0], state)
        stop = whole.split()[2]
        (text,) = answer(pipeline, PROMPTS[0], state, min_new_tokens=1, stop_strings=[stop])
        assert text == " ".join(whole.split()[: whole.split().index(stop) + 1])

    def test_generate_outputs_and_several_sequences_become_texts(self, pipeline):
        state = pipeline.write(CONTEXTS[0])
        assert answer(pipeline, PROMPTS, state, return_dict_in_generate=True) == answer(pipeline, PROMPTS, state)
        texts = answer(pipeline, PROMPTS[:2], state, num_beams=2, num_return_sequences=2)
        assert len(texts) == 4

    def test_pad_token_zero_counts(self, pipeline):
        """Token 0 is the pad token of many tokenizers; it is not "none"."""
        pipeline.model.generation_config.pad_token_id = None
        assert pipeline.generation_options({})["pad_token_id"] == 0
        pipeline.tokenizer.eos_token = None
        assert pipeline.generation_options({})["pad_token_id"] == 0
        assert pipeline.generation_options({"pad_token_id": 5})["pad_token_id"] == 5

    def test_generate_with_a_lora_equals_that_of_the_model(self):
        pipeline = make(lora_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        states = pipeline.write(CONTEXTS)
        expected = [by_hand(pipeline, prompt, state) for prompt, state in zip(PROMPTS, states, strict=True)]
        assert answer(pipeline, PROMPTS, states) == expected


class TestFormat:
    @pytest.mark.parametrize(
        ("query_format", "formatted", "special"),
        [
            ("text", "w1 w2", True),
            ("chat", "<s> user : w1 w2 assistant :", False),
            ("Question : {query} :", "Question : w1 w2 :", True),
        ],
    )
    def test_queries_are_formatted(self, query_format, formatted, special):
        pipeline = make(bos=True, query_format=query_format)
        state = pipeline.write(CONTEXTS[0])
        assert pipeline.format_query("w1 w2") == (formatted, special)
        assert answer(pipeline, "w1 w2", state) == [by_hand(pipeline, formatted, state, special)]

    def test_braces_in_a_query_are_kept(self):
        assert make(query_format="{query} {x}").format_query("{query} {y}") == ("{query} {y} {x}", True)

    @pytest.mark.parametrize("query_format", ["text", "chat", "Question : {query}"])
    def test_messages_use_the_chat_template(self, query_format):
        pipeline = make(bos=True, query_format=query_format)
        state = pipeline.write(CONTEXTS[0])
        formatted = "<s> user : w1 w2 assistant : w3 user : w4 assistant :"
        assert pipeline.format_query(CHAT) == (formatted, False)
        expected = [by_hand(pipeline, formatted, state, special=False)]
        assert answer(pipeline, CHAT, state) == answer(pipeline, [CHAT], state) == expected
        assert answer(pipeline, [CHAT, "w5"], state) == expected + answer(pipeline, "w5", state)

    def test_messages_without_a_chat_template_are_refused(self):
        tokenizer = tiny_tokenizer(chat_template=None)
        with pytest.raises(ValueError, match="no chat template"):
            answer(make(tokenizer=tokenizer), CHAT)
        with pytest.raises(ValueError, match="no chat template"):
            answer(make(tokenizer=tokenizer, query_format="chat"), "w1")


def in_time(function, seconds=20):
    """The result of a call that must not hang."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=seconds)


def stream_threads():
    return [thread for thread in threading.enumerate() if thread.name == "gradmem-stream"]


class TestStream:
    @pytest.mark.parametrize("prompt", [PROMPTS[0], CHAT], ids=["text", "chat"])
    @pytest.mark.parametrize("memory", [True, False])
    def test_pieces_add_up_to_the_text(self, pipeline, prompt, memory):
        state = pipeline.write(CONTEXTS[0]) if memory else None
        options = {"memory": state, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        pieces = list(pipeline.stream(prompt, **options))
        assert len(pieces) > 3
        assert all(pieces)
        assert "".join(pieces) == pipeline.generate(prompt, **options)[0]
        assert not stream_threads()

    def test_stop_strings_and_criteria_end_a_stream(self, pipeline):
        state = pipeline.write(CONTEXTS[0])
        options = {"memory": state, "max_new_tokens": 12, "do_sample": False}
        stop = pipeline.generate(PROMPTS[0], min_new_tokens=12, **options)[0].split()[1]
        options["min_new_tokens"] = 2
        expected = pipeline.generate(PROMPTS[0], stop_strings=[stop], **options)[0]
        assert "".join(pipeline.stream(PROMPTS[0], stop_strings=[stop], **options)) == expected

        class AtOnce(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.ones(len(input_ids), dtype=torch.bool)

        first = pipeline.generate(PROMPTS[0], stopping_criteria=[AtOnce()], **options)[0]
        assert "".join(pipeline.stream(PROMPTS[0], stopping_criteria=[AtOnce()], **options)) == first
        assert len(first.split()) == 1

    def test_an_error_in_generate_is_raised(self, pipeline):
        state = pipeline.write(CONTEXTS)
        ways = "GradMemPipeline.surest_answer, .* side by side"
        with pytest.raises(ValueError, match=f"Got 1 query for 3 memory states: .* {ways}"):
            in_time(lambda: list(pipeline.stream(PROMPTS[0], memory=state)))
        with pytest.raises(ValueError, match="no_such_option"):
            in_time(lambda: list(pipeline.stream(PROMPTS[0], no_such_option=1)))
        assert not stream_threads()

    def test_an_error_half_way_is_raised(self, pipeline, monkeypatch):
        calls = []

        def fail(*args):
            calls.append(args)
            if len(calls) == 4:
                raise RuntimeError("out of memory")

        hook = pipeline.model.get_base_model().register_forward_pre_hook(fail)
        pieces = []

        def consume():
            pieces.extend(pipeline.stream(PROMPTS[0], max_new_tokens=12, min_new_tokens=12, do_sample=False))

        with pytest.raises(RuntimeError, match="out of memory"):
            in_time(consume)
        whole = pipeline.generate(PROMPTS[0], max_new_tokens=3, min_new_tokens=3, do_sample=False)[0]
        assert pieces
        assert whole.startswith("".join(pieces))
        hook.remove()
        assert answer(pipeline, PROMPTS[0])

    def test_an_error_in_decoding_is_raised(self, pipeline, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("cannot decode")

        monkeypatch.setattr(pipeline.tokenizer, "decode", fail)
        result = []

        def consume():
            try:
                list(pipeline.stream(PROMPTS[0], max_new_tokens=4, min_new_tokens=4, do_sample=False))
            except RuntimeError as error:
                result.append(str(error))

        thread = threading.Thread(target=consume, daemon=True)
        thread.start()
        thread.join(20)
        assert result == ["cannot decode"]

    def test_closing_stops_the_generation(self, pipeline):
        calls = []

        def slow(*args):
            calls.append(args)
            time.sleep(0.02)

        pipeline.model.get_base_model().register_forward_pre_hook(slow)
        stream = pipeline.stream(PROMPTS[0], max_new_tokens=60, min_new_tokens=60, do_sample=False)
        assert next(stream)
        assert stream_threads()
        stream.close()
        assert not stream_threads()
        assert len(calls) < 30


class TestThreads:
    def test_two_threads_get_the_same_results_as_one(self, pipeline):
        def work(i):
            state = pipeline.write(CONTEXTS[i % 3], steps=3)
            text = answer(pipeline, PROMPTS[i % 3], state)
            streamed = "".join(pipeline.stream(PROMPTS[i % 3], memory=state, max_new_tokens=8, do_sample=False))
            return (
                state.to_bytes(),
                text,
                streamed,
                answer(pipeline, PROMPTS),
                pipeline.fidelity(CONTEXTS[i % 3], state),
            )

        expected = [work(i) for i in range(6)]
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(work, range(6))) == expected

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_the_tokenizer_is_not_changed(self, side):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = side
        before = tokenizer.backend_tokenizer.to_str(), dict(vars(tokenizer))
        pipeline = make(tokenizer=tokenizer)
        states = pipeline.write(CONTEXTS)
        texts = answer(pipeline, [*PROMPTS[:2], CHAT], states)
        list(pipeline.stream(PROMPTS[0], memory=states[0], max_new_tokens=3))
        assert tokenizer.padding_side == side
        assert (tokenizer.backend_tokenizer.to_str(), dict(vars(tokenizer))) == before
        other = make()
        assert answer(other, [*PROMPTS[:2], CHAT], other.write(CONTEXTS)) == texts


class TestRefused:
    def test_a_tokenizer_without_pad_and_end_token(self):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token = None
        with pytest.raises(ValueError, match="neither a pad nor an eos token"):
            make(tokenizer=tokenizer)

    def test_a_pad_token_that_the_model_does_not_have(self):
        """As when one is added without resizing the model; texts of equal length would still work."""
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        with pytest.raises(ValueError, match=r"pad token has id 61, but the model knows 0 to 60.*resize_token_emb"):
            make(tokenizer=tokenizer)

    def test_the_end_token_replaces_a_missing_pad_token(self):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = None
        pipeline, usual = make(tokenizer=tokenizer), make()
        states = pipeline.write(CONTEXTS)
        assert states.equal(usual.write(CONTEXTS))
        assert answer(pipeline, PROMPTS, states) == answer(usual, PROMPTS, states)
        assert tokenizer.pad_token is None

    def test_a_model_without_a_gradmem_adapter(self):
        with pytest.raises(TypeError, match=r"needs a model with a GradMem adapter, got LlamaForCausalLM"):
            GradMemPipeline(tiny(), tiny_tokenizer())
        lora = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(TypeError, match="needs a model with a GradMem adapter"):
            GradMemPipeline(lora, tiny_tokenizer())


class Recording:
    """A reader that passes calls on to a model and keeps what it was asked."""

    def __init__(self, model):
        self.model, self.asked = model, []

    def generate(self, **options):
        self.asked.append(options)
        return self.model.generate(**options)


class TestReader:
    def test_a_reader_gives_every_answer_from_memory(self, pipeline):
        reader = Recording(pipeline.model)
        other = GradMemPipeline(pipeline.model, pipeline.tokenizer, reader=reader)
        states = pipeline.write(CONTEXTS)
        assert answer(other, PROMPTS, states) == answer(pipeline, PROMPTS, states)
        (whole,) = answer(pipeline, PROMPTS[0], states[0])
        pieces = other.stream(PROMPTS[0], memory=states[0], max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert "".join(pieces) == whole
        assert [len(asked["input_ids"]) for asked in reader.asked] == [3, 1]
        assert all(asked["memory"] is not None and "attention_mask" in asked for asked in reader.asked)

    def test_a_reader_is_not_asked_without_memory(self, pipeline):
        reader = Recording(pipeline.model)
        other = GradMemPipeline(pipeline.model, pipeline.tokenizer, reader=reader)
        assert answer(other, PROMPTS) == answer(pipeline, PROMPTS)
        assert reader.asked == []
