"""Engine readers give the same as Transformers, in whatever order an engine answers, and check before they ask."""

import copy

import pytest
import torch
from adapters import lora, make
from tiny import tiny_tokenizer, tokens
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gradmem_adapter import GradMemPipeline, MemoryState
from gradmem_adapter.export import export_model
from gradmem_adapter.export.engine import EngineReader

GREEDY = {"max_new_tokens": 10, "do_sample": False}


class PlainReader(EngineReader):
    """Plain Transformers on an exported directory as the engine; later prompts are answered ahead of earlier ones."""

    def __init__(self, model, path, **options):
        super().__init__(model, **options)
        self.engine = AutoModelForCausalLM.from_pretrained(path).eval()
        self.asked, self.closed = [], 0

    def _answers(self, prompts, sampling):
        self.asked.append((prompts, sampling))
        answers = []
        for prefix, query in prompts:
            embeddings = torch.cat([prefix, self.engine.get_input_embeddings()(torch.tensor(query))])[None]
            answers.append(
                self.engine.generate(
                    inputs_embeds=embeddings,
                    attention_mask=torch.ones(embeddings.shape[:2]),
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=sampling.stop_token_ids or None,
                    do_sample=False,
                )[0].tolist()
            )
        try:
            turn = 0
            while any(answers):
                for i in reversed(range(len(answers))):
                    count = min(1 + (i + turn) % 3, len(answers[i]))
                    if count:
                        given, answers[i] = answers[i][:count], answers[i][count:]
                        yield i, given, not answers[i]
                turn += 1
        finally:
            self.closed += 1


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model"
    model = make(lora_config=lora(), num_control_tokens=1)
    export_model(model, tiny_tokenizer(), path)
    return PlainReader(model, path, check_model=False)


@pytest.fixture(scope="module")
def states(reader):
    return reader.model.write(tokens(3, 9))


@pytest.fixture(scope="module")
def prompts():
    ids, mask = tokens(3, 6, seed=1), torch.ones(3, 6, dtype=torch.long)
    ids[1, :2], mask[1, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("eos", [None, [2, 9, 17, 23, 31, 44]])
def test_a_batch_equals_that_of_transformers(reader, states, prompts, eos):
    options = GREEDY | {"eos_token_id": eos}
    expected = reader.model.generate(**prompts, memory=states, **options)
    assert reader.generate(**prompts, memory=states, **options).tolist() == expected.tolist()
    one = reader.model.generate(**prompts, memory=states[0], **options)
    assert reader.generate(**prompts, memory=states[0], **options).tolist() == one.tolist()


def test_right_padding_and_max_length(reader, states, prompts):
    right = {name: value.flip(1) for name, value in prompts.items()}
    expected = reader.model.generate(**right, memory=states, max_length=12, do_sample=False)
    assert reader.generate(**right, memory=states, max_length=12, do_sample=False).tolist() == expected.tolist()


@pytest.mark.parametrize("index", [[2, 0, 0], [[0, 1], [1, 2], [2, 2]]])
def test_context_index_chooses_states(reader, states, prompts, index):
    options = {"memory": states, "context_index": torch.tensor(index), **GREEDY}
    assert reader.generate(**prompts, **options).tolist() == reader.model.generate(**prompts, **options).tolist()


class Counting(StoppingCriteria):
    """Ends each row after a number of tokens, and keeps what it was shown."""

    def __init__(self, counts, length):
        self.counts, self.length, self.shown = torch.tensor(counts), length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.shown.append(input_ids.tolist())
        return self.counts <= input_ids.shape[1] - self.length


def test_stopping_criteria_see_the_same_as_in_transformers(reader, states, prompts):
    shown = []
    for model in (reader.model, reader):
        criterion = Counting([3, 1, 5], 6)
        output = model.generate(**prompts, memory=states, stopping_criteria=[criterion], **GREEDY)
        shown.append((output.tolist(), criterion.shown))
    assert shown[0] == shown[1]
    assert len(shown[0][0][0]) == 6 + 5


def test_a_pipeline_with_the_reader_equals_one_without(reader, states):
    tokenizer = tiny_tokenizer()
    own, other = GradMemPipeline(reader.model, tokenizer), GradMemPipeline(reader.model, tokenizer, reader=reader)
    questions = ["w1 w2", "w3 w4 w5", "w6"]
    expected = own.generate(questions, memory=states, **GREEDY)
    assert other.generate(questions, memory=states, **GREEDY) == expected
    assert "".join(other.stream(questions[0], memory=states[0], **GREEDY)) == expected[0]
    stop = expected[0].split()[2]
    options = GREEDY | {"stop_strings": [stop]}
    assert other.generate(questions, memory=states, **options) == own.generate(questions, memory=states, **options)
    asked = len(reader.asked)
    assert other.generate(questions, **GREEDY) == own.generate(questions, **GREEDY)
    assert len(reader.asked) == asked


def test_closing_a_stream_stops_the_engine(reader, states):
    pipeline = GradMemPipeline(reader.model, tiny_tokenizer(), reader=reader)
    closed = reader.closed
    pieces = pipeline.stream("w1 w2", memory=states[0], max_new_tokens=60, do_sample=False, eos_token_id=None)
    next(pieces)
    pieces.close()
    assert reader.closed == closed + 1


def test_sampling_options_reach_the_engine(reader, states, prompts):
    reader.generate(**prompts, memory=states, max_new_tokens=2, do_sample=True, temperature=0.5, top_k=7, top_p=0.9)
    assert reader.asked[-1][1] == (2, [2], 0.5, 7, 0.9)
    reader.generate(**prompts, memory=states, max_new_tokens=2, do_sample=False, temperature=0.5, eos_token_id=[3, 4])
    assert reader.asked[-1][1] == (2, [3, 4], 0.0, 0, 1.0)


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 0}, {"top_k": 7}, {"top_k": None}, {"temperature": None, "top_p": None}, {"temperature": 0.5},
     {"top_p": 0.3}, {"generation_config": GenerationConfig(top_k=9, temperature=2.0)}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("of_model", [{}, {"top_k": 11, "temperature": 0.8}], ids=["plain", "configured"])
def test_sampling_defaults_are_those_of_transformers(reader, states, monkeypatch, options, of_model):
    for name, value in of_model.items():
        monkeypatch.setattr(reader.model.get_base_model().generation_config, name, value)
    asked = {"memory": states[0], "max_new_tokens": 1, "do_sample": True} | options
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    if "generation_config" in options:
        asked = {"memory": states[0], "generation_config": copy.deepcopy(options["generation_config"])}
        asked["generation_config"].update(max_new_tokens=1, do_sample=True)
    plain = reader.model.generate(tokens(1, 4), **copy.deepcopy(asked), **wanted)
    reader.generate(tokens(1, 4), **asked)
    sampling = reader.asked[-1][1]
    found = plain.logits[0]
    if sampling.temperature != 1:
        found = TemperatureLogitsWarper(sampling.temperature)(None, found)
    if sampling.top_k:
        found = TopKLogitsWarper(sampling.top_k)(None, found)
    if sampling.top_p < 1:
        found = TopPLogitsWarper(sampling.top_p)(None, found)
    torch.testing.assert_close(found, plain.scores[0])


def test_answers_stop_at_the_models_last_position(reader, states):
    with pytest.warns(UserWarning, match="The answer will end after"):
        output = reader.generate(tokens(1, 80), memory=states[0], max_new_tokens=50, do_sample=False, eos_token_id=None)
    assert output.shape[1] == 96 + 1 - reader.model.prefix_length


class TestRefused:
    @pytest.fixture(autouse=True)
    def _nothing_is_asked(self, reader):
        before = len(reader.asked)
        yield
        assert len(reader.asked) == before

    def test_unsuitable_states(self, reader, states, prompts):
        ids = prompts["input_ids"]
        other = make(num_memory_tokens=4).write(tokens(1, 9))
        with pytest.raises(ValueError, match="written by model"):
            reader.generate(ids, memory=other, **GREEDY)
        for value in (float("nan"), float("inf")):
            vectors = states.vectors.clone()
            vectors[1, 2, 3] = value
            broken = MemoryState(vectors, states.context_tokens, states.write_losses, states.fingerprint)
            with pytest.raises(ValueError, match="not finite"):
                reader.generate(ids, memory=broken, **GREEDY)
        with pytest.raises(ValueError, match="3 queries for 2 memory states"):
            reader.generate(ids, memory=states[:2], **GREEDY)
        with pytest.raises(ValueError, match="must be between 0 and 2"):
            reader.generate(ids, memory=states, context_index=torch.tensor([0, -1, 2]), **GREEDY)
        with pytest.raises(TypeError, match="MemoryState"):
            reader.generate(ids, memory=states.vectors, **GREEDY)

    def test_invalid_prompts(self, reader, states):
        with pytest.raises(ValueError, match="are allowed"):
            reader.generate(tokens(1, 95), memory=states[0], **GREEDY)
        with pytest.raises(ValueError, match="1000"):
            reader.generate(torch.tensor([[1000]]), memory=states[0], **GREEDY)

    @pytest.mark.parametrize(
        "option",
        [
            {"num_beams": 2},
            {"repetition_penalty": 1.2},
            {"num_return_sequences": 2},
            {"min_new_tokens": 1},
            {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])},
            {"return_dict_in_generate": True},
        ],
    )
    def test_unsupported_options(self, reader, states, prompts, option):
        with pytest.raises(NotImplementedError, match=next(iter(option))):
            reader.generate(**prompts, memory=states, **GREEDY | option)

    def test_unsupported_options_of_the_model(self, reader, states, prompts, monkeypatch):
        config = reader.model.get_base_model().generation_config
        monkeypatch.setattr(config, "repetition_penalty", 1.3)
        with pytest.raises(NotImplementedError, match="repetition_penalty"):
            reader.generate(**prompts, memory=states, **GREEDY)


def test_options_without_effect_are_accepted(reader, states, prompts):
    options = {
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "logits_processor": LogitsProcessorList(),
        "min_new_tokens": 0,
    }
    expected = reader.model.generate(**prompts, memory=states, **GREEDY)
    assert reader.generate(**prompts, memory=states, **GREEDY | options).tolist() == expected.tolist()


def test_an_engine_that_stops_early_is_an_error(reader, states, prompts, monkeypatch):
    monkeypatch.setattr(PlainReader, "_answers", lambda *_: iter_of((0, [5], True)))
    with pytest.raises(RuntimeError, match="stopped before"):
        reader.generate(**prompts, memory=states, **GREEDY)


def iter_of(*pieces):
    yield from pieces


def test_errors_of_the_engine_end_a_stream(reader, states, monkeypatch):
    def broken(*_):
        yield 0, [5], False
        raise RuntimeError("out of blocks")

    monkeypatch.setattr(PlainReader, "_answers", broken)
    pipeline = GradMemPipeline(reader.model, tiny_tokenizer(), reader=reader)
    with pytest.raises(RuntimeError, match="out of blocks"):
        list(pipeline.stream("w1", memory=states[0], **GREEDY))


def test_streamers_get_the_same_as_in_transformers(reader, states):
    texts = []
    for model in (reader.model, reader):
        streamer = TextIteratorStreamer(tiny_tokenizer(), timeout=60)
        model.generate(tokens(1, 4), memory=states[0], streamer=streamer, **GREEDY)
        texts.append(list(streamer))
    assert texts[0] == texts[1]


class TestTheEnginesModel:
    """Before its first answer, an engine has to show that it serves the adapter's model."""

    @pytest.fixture
    def checking(self, reader):
        made = PlainReader.__new__(PlainReader)
        EngineReader.__init__(made, reader.model)
        made.engine, made.asked, made.closed = reader.engine, [], 0
        return made

    def test_it_is_checked_on_eight_tokens_in_all(self, checking, states, prompts):
        for count in (3, 10, 10):
            options = GREEDY | {"max_new_tokens": count}
            expected = checking.model.generate(**prompts, memory=states, **options)
            assert checking.generate(**prompts, memory=states, **options).tolist() == expected.tolist()
        counts = [(len(asked), sampling.max_new_tokens) for asked, sampling in checking.asked]
        assert counts == [(1, 3), (3, 3), (1, 5), (3, 10), (3, 10)]
        assert checking.asked[0][1] == (3, [], 0.0, 0, 1.0)

    @pytest.mark.parametrize("wrong", ["without the LoRA", "another model"])
    def test_another_model_is_refused(self, checking, states, prompts, wrong):
        checking.engine = make(backbone={"seed": 1}).get_base_model()
        if wrong == "without the LoRA":
            checking.engine = make().get_base_model()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="does not serve the model"):
                checking.generate(**prompts, memory=states, **GREEDY)
        assert all(len(asked) == 1 for asked, _ in checking.asked)

    def test_a_model_with_more_tokens_is_refused(self, checking, states, prompts, monkeypatch):
        monkeypatch.setattr(checking, "_answers", lambda prompts, sampling: iter_of((0, [1000] * 8, True)))
        with pytest.raises(RuntimeError, match="does not serve the model"):
            checking.generate(**prompts, memory=states, **GREEDY)

    @pytest.mark.parametrize("token", [61, -1, 10**30])
    def test_an_answer_with_an_unknown_token_is_refused(self, reader, states, prompts, monkeypatch, token):
        """Also where models are not compared, or later in an answer."""
        monkeypatch.setattr(reader, "_answers", lambda *_: iter_of((0, [5, 6], False), (1, [7, token], True)))
        with pytest.raises(RuntimeError, match=f"its answer has the tokens .{token}., which are not in this model"):
            reader.generate(**prompts, memory=states, **GREEDY)

    def test_small_rounding_differences_are_accepted(self, checking, states, prompts):
        checking.engine = copy.deepcopy(checking.engine)
        with torch.no_grad():
            checking.engine.get_output_embeddings().weight.mul_(1.001)
        checking.generate(**prompts, memory=states, **GREEDY)
