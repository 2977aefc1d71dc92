"""Self-study: the memory of an unchanged backbone learns the answers that the text gives."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from adapters import lora, make
from peft import get_peft_model
from tiny import tiny, tiny_text, tiny_tokenizer, tokens

from gradmem_adapter import GradMemConfig, GradMemPipeline, MemoryState, MemoryStore, Study, WriteOptions
from gradmem_adapter.ops import answers
from gradmem_adapter.prompts import study_tokens
from gradmem_adapter.write import self_study

SMALL = Study(queries=6, batch=3, query_tokens=4, answer_tokens=5)
ASKING = replace(SMALL, before=(1, 4), between=(5,), after=(6, 7), requests=(((8, 9), (10,)), ((11,), (12, 13))))
IDS = tokens(1, 9)


def model(architecture="llama", m=4):
    return get_peft_model(tiny(architecture), GradMemConfig(num_memory_tokens=m)).eval()


def writer(of):
    return of.base_model._writer


def write(of, ids=IDS, study=ASKING, **options):
    return of.write(ids, objective="self_study", study=study, **{"steps": 12} | options)


@pytest.mark.parametrize("study", [SMALL, ASKING], ids=["continuations", "queries"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mistral"])
def test_sharing_the_prefix_cache_between_rows_changes_nothing(architecture, study, monkeypatch):
    """Keys and values of the prefix are computed once instead of once per row."""
    of = writer(model(architecture))
    found = []
    for shares in (answers.shares_caches, lambda backbone: False):
        monkeypatch.setattr(self_study, "shares_caches", shares)
        monkeypatch.setattr(answers, "shares_caches", shares)
        with torch.no_grad():
            lessons = self_study.learn(of, IDS[0].tolist(), study)
        width = of.backbone.get_input_embeddings().weight.shape[1]
        memory = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
        found.append((lessons, self_study.SelfStudy(of, [lessons], study)(memory, None, True, True)))
    (one, a), (other, b) = found
    assert [(x.query, x.answer) for x in one] == [(x.query, x.answer) for x in other]
    assert len(one) == 6
    torch.testing.assert_close([x.hidden for x in one], [x.hidden for x in other], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_queries_start_as_requested_and_answers_are_the_models_own():
    of = writer(model())
    with torch.no_grad():
        lessons = self_study.learn(of, IDS[0].tolist(), ASKING)
    assert [lesson.query[:3] for lesson in lessons[:2]] == [[1, 4, 10], [1, 4, 12]]
    for query, answer, hidden in lessons:
        assert query[-2:] == [6, 7]
        text = torch.tensor([[1, 4, *IDS[0].tolist(), 5, *query[2:]]])
        for token, state in zip(answer, hidden, strict=True):
            output = tiny()(text, output_hidden_states=True)
            torch.testing.assert_close(output.hidden_states[-1][0, -1], state, rtol=1e-4, atol=1e-4)
            assert int(output.logits[0, -1].argmax()) == token or token == answer[0]  # an answer never ends at once
            text = torch.cat([text, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("study", [SMALL, ASKING], ids=["continuations", "queries"])
def test_the_generation_config_affects_neither_queries_nor_answers(study):
    """It is meant for chatting: penalties for repeating the text would do most harm here."""
    of = writer(model())
    found = []
    for own in ({}, {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "suppress_tokens": [9], "temperature": 9.0}):
        for name, value in own.items():
            setattr(of.backbone.generation_config, name, value)
        with torch.no_grad():
            found.append([lesson[:2] for lesson in self_study.learn(of, IDS[0].tolist(), study)])
    assert found[0] == found[1]
    assert of.backbone.generation_config.repetition_penalty == 5.0


def test_memory_equal_to_the_text_has_no_loss():
    of = writer(model(m=9))
    study = Study(queries=4, batch=4, query_tokens=4, answer_tokens=5, requests=ASKING.requests, after=(6,))
    with torch.no_grad():
        lessons = self_study.learn(of, IDS[0].tolist(), study)
        memory = self_study.unexpected_tokens(of, IDS[0].tolist())
        assert torch.equal(memory, tiny().get_input_embeddings()(IDS[0]))
        loss, same = self_study.SelfStudy(of, [lessons], study).loss(memory[None], lessons)
    assert abs(float(loss)) < 1e-6
    assert same == 1


@pytest.mark.parametrize("study", [SMALL, ASKING], ids=["continuations", "queries"])
def test_write_lowers_the_loss(study):
    state = write(model(), study=study, steps=60)
    assert state.write_losses.shape == (1, 61)
    assert state.write_losses[0, -1] < 0.5 * state.write_losses[0, :3].mean()


def test_states_depend_on_the_seed_but_not_on_the_batch():
    of, ids = model(), tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    states = write(of, ids, attention_mask=mask)
    assert states.equal(write(of, ids, attention_mask=mask))
    assert not states.equal(write(of, ids, attention_mask=mask, study=replace(ASKING, seed=1)))
    for i, length in enumerate((9, 6, 9)):
        torch.testing.assert_close(states.vectors[i], write(of, ids[i : i + 1, :length]).vectors[0])
    many = [row[:n] for row, n in zip(ids, (9, 6, 9), strict=True)]
    options = WriteOptions(objective="self_study", study=ASKING, steps=12)
    torch.testing.assert_close(of.write_many(many, options=options).vectors, states.vectors)


def test_self_study_has_no_side_effects():
    of = model()
    before = copy.deepcopy(of.state_dict())
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    with torch.inference_mode():
        inside = write(of)
    with torch.no_grad():
        outside = write(of)
    assert inside.equal(outside)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[name], value) for name, value in of.state_dict().items())
    assert all(parameter.grad is None for parameter in of.parameters())


def test_self_study_continues_from_a_state():
    of = model()
    first = write(of)
    assert not write(of, initial=first, steps=4).equal(first)
    assert torch.equal(write(of, initial=first, steps=0).vectors, first.vectors)


def test_it_starts_from_the_least_expected_tokens():
    of = writer(model(m=3))
    ids = IDS[0].tolist()
    with torch.no_grad():
        start = self_study.unexpected_tokens(of, ids)
        scores = tiny()(IDS).logits[0].log_softmax(-1)
    surprise = [float("inf"), *(-float(scores[i, token]) for i, token in enumerate(ids[1:]))]
    kept = sorted(sorted(range(9), key=lambda i: -surprise[i])[:3])
    assert torch.equal(start, tiny().get_input_embeddings()(IDS[0, kept]))
    short = self_study.unexpected_tokens(writer(model(m=5)), ids[:2])
    assert torch.equal(short, tiny().get_input_embeddings()(torch.tensor([ids[0]] * 3 + [ids[1]] * 2)))


class TestPipeline:
    def pipeline(self, query_format="chat"):
        config = GradMemConfig(num_memory_tokens=4, query_format=query_format)
        return GradMemPipeline(get_peft_model(tiny(), config).eval(), tiny_tokenizer(bos=True))

    @pytest.mark.parametrize("query_format", ["text", "chat", "Question : {query} :"])
    def test_queries_are_formatted_as_by_the_pipeline(self, query_format):
        pipeline = self.pipeline(query_format)
        study = study_tokens(query_format, pipeline.tokenizer)
        shown = [*study["before"], *pipeline.tokenizer("w1 w2", add_special_tokens=False)["input_ids"], *study["after"]]
        assert pipeline.encode_prompts(["w1 w2"])[0][0].tolist() == shown

    def test_options_and_keywords_give_the_same_state(self, tmp_path):
        pipeline = self.pipeline()
        study = Study(queries=4, batch=2, query_tokens=3, answer_tokens=4)
        options = WriteOptions(objective="self_study", study=study, steps=3)
        state = pipeline.write(tiny_text(9), options=options)
        assert state.equal(pipeline.write(tiny_text(9), objective="self_study", study=study, steps=3))
        assert state.equal(pipeline.write_many([tiny_text(9)], options=options))
        filled = replace(study, **study_tokens("chat", pipeline.tokenizer))
        assert state.equal(pipeline.write(tiny_text(9), objective="self_study", study=filled, steps=3))
        assert pipeline.generate("w1", memory=state, max_new_tokens=3)
        store = MemoryStore(tmp_path, dtype="float32")
        assert store.get(store.add(pipeline, tiny_text(9), options=options)).equal(state)

    def test_the_callback_reports_progress(self):
        seen = []
        self.pipeline().write(
            tiny_text(9), callback=seen.append, objective="self_study", study=Study(queries=3, batch=2), steps=2
        )
        assert [progress.step for progress in seen] == [0, 1, 2]
        assert all(0 <= float(progress.recovered) <= 1 for progress in seen)


class TestRefused:
    @pytest.mark.parametrize(
        "config",
        [{"lora_config": lora()}, {"memory_projection": "shared"}, {"num_control_tokens": 1}],
        ids=lambda config: next(iter(config)),
    )
    def test_an_adapter_that_changes_read(self, config):
        with pytest.raises(ValueError, match="needs an unchanged backbone"):
            write(make(**config))

    def test_a_context_without_room_for_queries(self):
        with pytest.raises(ValueError, match="A context has 80 tokens"):
            write(model(), tokens(1, 80))
        assert len(write(model(), tokens(1, 75), steps=0)) == 1

    def test_one_long_context_is_refused_before_any_is_studied(self, monkeypatch):
        monkeypatch.setattr(self_study, "learn", None)
        mask = torch.ones(2, 80, dtype=torch.long)
        mask[0, 5:] = 0
        with pytest.raises(ValueError, match="A context has 80 tokens"):
            model().write(tokens(2, 80), mask, objective="self_study", study=ASKING)

    @pytest.mark.parametrize(
        ("study", "most"), [(replace(SMALL, answer_tokens=9), 22), (ASKING, 20)], ids=["continuations", "queries"]
    )
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_states_side_by_side_without_room_for_queries(self, architecture, study, most):
        """Of 96 positions, an answer needs 8, or 4 and another 10 for its query and the template around it."""
        of = model(architecture)
        state = MemoryState.concat(list(of.write(tokens(most + 1, 3), steps=0)))
        with pytest.raises(ValueError, match=f"The state has {4 * most + 4} vectors"):
            write(of, tokens(1, 3), study=study, initial=state)
        state = MemoryState.concat(list(of.write(tokens(most, 3), steps=0)))
        assert len(write(of, tokens(1, 3), study=study, initial=state, steps=1)) == 1

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"objective": "recite"}, "objective must be one of"),
            ({"objective": "self_study", "tolerance": 0.1}, "cannot be used with objective"),
            ({"objective": "self_study", "stop_when_recovered": True}, "cannot be used with objective"),
            ({"objective": "self_study", "compile": True}, "compile=True cannot be used with"),
            ({"objective": "self_study", "max_memory": 2**30}, "max_memory applies to objective='reconstruction' only"),
            ({"objective": "self_study", "study": {}}, "study must be a Study"),
            ({"study": SMALL}, "study has no effect"),
        ],
        ids=str,
    )
    def test_invalid_options(self, fields, message):
        with pytest.raises(ValueError, match=message):
            WriteOptions(**fields)

    @pytest.mark.parametrize("field", ["queries", "batch", "query_tokens", "answer_tokens", "seed"])
    def test_an_invalid_study(self, field):
        for wrong in (-1, 1.5, True, "8"):
            with pytest.raises(ValueError, match=f"{field} of a Study must be an integer"):
                Study(**{field: wrong})


def test_batches_cycle_through_all_lessons():
    of = writer(model())
    with torch.no_grad():
        lessons = self_study.learn(of, IDS[0].tolist(), Study(queries=7, batch=3, answer_tokens=3))
    study = self_study.SelfStudy(of, [lessons], Study(queries=7, batch=3))
    drawn = [study._next() for _ in range(7)]
    assert all(len(part) == 3 for part in drawn)
    assert sorted(i for part in drawn for i in part) == sorted([*range(7)] * 3)
    assert any(a != b for a, b in pairwise(drawn))
