"""How far memory supports an answer: the likelihood of its tokens, and a score derived from it."""

import math

import pytest
import torch
from adapters import lora
from peft import get_peft_model
from tiny import tiny, tiny_text, tiny_tokenizer, tokens

from gradmem_adapter import GradMemConfig, GradMemPipeline, MemoryState, ScoredText
from gradmem_adapter.read.likelihood import scores
from gradmem_adapter.support import surest

CONTEXTS = [tiny_text(9, 1), tiny_text(5, 2), tiny_text(12, 3)]
PROMPTS = [tiny_text(6, 4), tiny_text(2, 5), tiny_text(4, 6)]
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def make(architecture="llama", **config):
    config = GradMemConfig(num_memory_tokens=3, write_lr=0.3, memory_init_std=0.5, lora_config=lora(), **config)
    return GradMemPipeline(get_peft_model(tiny(architecture), config).eval(), tiny_tokenizer())


def likelihood(model, query, answer, **memory):
    """From the model's own forward, for one row."""
    ids = torch.tensor([[*query, *answer]])
    with torch.no_grad():
        logits = model(input_ids=ids, **memory).logits[0, len(query) - 1 : -1].log_softmax(-1)
    return sum(float(row[token]) for row, token in zip(logits, answer, strict=True)) / len(answer)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_log_likelihood_is_the_mean_over_the_tokens(architecture):
    model = make(architecture).model
    states = model.write(tokens(3, 9))
    queries = [tokens(1, n, seed=n)[0].tolist() for n in (4, 2, 7)]
    answers = [tokens(1, n, seed=n + 9)[0].tolist() for n in (3, 5, 1)]
    expected = [
        likelihood(model, query, answer, memory=state)
        for query, answer, state in zip(queries, answers, states, strict=True)
    ]
    torch.testing.assert_close(
        model.log_likelihood(queries, answers, states), torch.tensor(expected), rtol=1e-4, atol=1e-4
    )
    one = model.log_likelihood(queries, answers, states, context_index=torch.tensor([1, 1, 0]))
    torch.testing.assert_close(one[0], model.log_likelihood(queries[:1], answers[:1], states[1])[0])


def test_answers_come_with_scores():
    pipeline = make()
    states = pipeline.write(CONTEXTS)
    scored = pipeline.generate(PROMPTS, memory=states, return_scores=True, **OPTIONS)
    assert all(isinstance(item, ScoredText) for item in scored)
    assert [text for text, _ in scored] == pipeline.generate(PROMPTS, memory=states, **OPTIONS)
    assert len({round(score, 6) for _, score in scored}) == 3
    for prompt, state, (text, score) in zip(PROMPTS, states, scored, strict=True):
        ((alone, same),) = pipeline.generate(prompt, memory=state, return_scores=True, **OPTIONS)
        assert alone == text
        assert same == pytest.approx(score, abs=1e-4)
        ids, _ = pipeline.encode_prompts([prompt])
        new = pipeline.model.generate(ids, memory=state, **OPTIONS)[0, ids.shape[1] :].tolist()
        expected = likelihood(pipeline.model, ids[0].tolist(), new, memory=state)
        assert score == pytest.approx(math.exp(expected), rel=1e-3)
    index = pipeline.generate(PROMPTS, memory=states, context_index=[0, 1, 2], return_scores=True, **OPTIONS)
    assert [score for _, score in index] == pytest.approx([score for _, score in scored], abs=1e-4)


def test_scores_use_the_adapters_calibration():
    plain, calibrated = make(), make(score_calibration=[2.0, -0.5])
    assert calibrated.model.active_peft_config.score_calibration == (2.0, -0.5)
    state = plain.write(CONTEXTS[0])
    ((_, score),) = plain.generate(PROMPTS[0], memory=state, return_scores=True, **OPTIONS)
    calibrated.model.load_state_dict(plain.model.state_dict())
    ((_, other),) = calibrated.generate(PROMPTS[0], memory=state, return_scores=True, **OPTIONS)
    assert other == pytest.approx(1 / (1 + math.exp(-(2 * math.log(score) - 0.5))), abs=1e-4)


@pytest.mark.parametrize("calibration", [None, [0.5, 1.0]])
def test_an_adapter_that_refuses_is_scored_by_its_refusal(calibration):
    pipeline = make(refusal="no idea", score_calibration=calibration)
    scale, offset = calibration or (1, 0)
    states = pipeline.write(CONTEXTS)
    refusal = [*pipeline.tokenizer("no idea")["input_ids"], pipeline.tokenizer.eos_token_id]
    scored = pipeline.generate(PROMPTS, memory=states, return_scores=True, **OPTIONS)
    for prompt, state, (_, score) in zip(PROMPTS, states, scored, strict=True):
        ids, _ = pipeline.encode_prompts([prompt])
        p = math.exp(len(refusal) * likelihood(pipeline.model, ids[0].tolist(), refusal, memory=state))
        assert score == pytest.approx(1 / (1 + math.exp(-scale * math.log((1 - p) / p) - offset)), rel=1e-4)


def test_scores_of_a_certain_refusal_and_a_certain_answer():
    assert scores(torch.tensor([0.0, -1e-9, -200.0]), None, 4).tolist() == pytest.approx([0, 4e-9, 1], abs=1e-9)


def test_an_answer_that_ends_early_gets_the_same_score_as_alone():
    """Padding after the end token is not part of an answer."""
    pipeline = make()
    states = pipeline.write(CONTEXTS)
    first = pipeline.model.generate(pipeline.encode_prompts(PROMPTS[:1])[0], memory=states[0], **OPTIONS)
    end = int(first[0, -3])
    scored = pipeline.generate(PROMPTS, memory=states, return_scores=True, eos_token_id=end, **OPTIONS)
    alone = [
        pipeline.generate(prompt, memory=state, return_scores=True, eos_token_id=end, **OPTIONS)[0].score
        for prompt, state in zip(PROMPTS, states, strict=True)
    ]
    assert [score for _, score in scored] == pytest.approx(alone, abs=1e-4)


def test_several_sequences_per_prompt_are_scored():
    pipeline = make()
    states = pipeline.write(CONTEXTS)
    scored = pipeline.generate(
        PROMPTS, memory=states, return_scores=True, num_beams=2, num_return_sequences=2, max_new_tokens=4
    )
    assert len(scored) == 6
    best = pipeline.generate(PROMPTS[1], memory=states[1], return_scores=True, num_beams=2, max_new_tokens=4)
    assert scored[2].score == pytest.approx(best[0].score, abs=1e-4)


def test_the_surest_of_several_states_answers():
    pipeline = make(refusal="no idea")
    states = pipeline.write(CONTEXTS)
    for prompt in PROMPTS:
        each = [pipeline.generate(prompt, memory=state, return_scores=True, **OPTIONS)[0] for state in states]
        found = pipeline.surest_answer(prompt, memory=states, **OPTIONS)
        assert pipeline.support(prompt, memory=states) == pytest.approx([one.score for one in each], abs=1e-4)
        assert found.state == max(range(3), key=lambda i: each[i].score)
        read = pipeline.select(prompt, memory=states)
        assert (read.memory, read.states, read.support) == (states[found.state], [found.state], found.score)
        assert (found.text, found.score) == (each[found.state].text, pytest.approx(each[found.state].score, abs=1e-4))
        several = pipeline.surest_answer(prompt, memory=states, num_return_sequences=2, num_beams=2, max_new_tokens=4)
        assert several.state == found.state


@pytest.mark.parametrize("refusal", ["no idea", None])
def test_select_reads_all_states_or_only_the_best(refusal):
    """All side by side, or the one that holds an answer: as the adapter was trained, or as requested."""
    pipeline = make(refusal=refusal)
    states = pipeline.write(CONTEXTS)
    whole = MemoryState.concat(list(states))
    if refusal is None:
        assert pipeline.select(PROMPTS[0], memory=states, support=True) == (whole, [0, 1, 2], None)
        with pytest.raises(ValueError, match="not trained to refuse"):
            pipeline.select(PROMPTS[0], memory=states, side_by_side=False)
    else:
        each = pipeline.support(PROMPTS[0], memory=states)
        best = each.index(max(each))
        assert pipeline.select(PROMPTS[0], memory=list(states)) == (states[best], [best], each[best])
        (supported,) = pipeline.support(PROMPTS[0], memory=whole)
        read = pipeline.select(PROMPTS[0], memory=states, side_by_side=True, support=True)
        assert read == (whole, [0, 1, 2], pytest.approx(supported))
        (alone,) = pipeline.support(PROMPTS[0], memory=states[1])
        assert pipeline.select(PROMPTS[0], memory=states[1], support=True) == (states[1], [0], pytest.approx(alone))

    def never():
        raise AssertionError("no search is needed")

    for memory, how in ((states, {"side_by_side": True}), (states[1], {})):
        read = pipeline.select(PROMPTS[0], memory=memory, search_scores=never, **how)
        assert (read.states, read.support) == (list(range(len(memory))), None)
    other_size = MemoryState.concat([states[0], states[1]])
    read = pipeline.select(PROMPTS[0], memory=[states[2], other_size], side_by_side=True)
    assert read.memory == MemoryState.concat([states[2], other_size])


@pytest.mark.parametrize("refusal", ["no idea", None])
def test_search_scores_count_besides_support(refusal):
    pipeline = make(refusal=refusal)
    states = pipeline.write(CONTEXTS)
    for best in range(3):
        searched = [float(i == best) for i in range(3)]
        found = pipeline.surest_answer(PROMPTS[0], memory=states, search_scores=searched, **OPTIONS)
        assert found.state == best  # untrained, no state supports an answer much more than another
        own = pipeline.generate(PROMPTS[0], memory=states[best], return_scores=True, **OPTIONS)[0]
        assert (found.text, found.score) == (own.text, pytest.approx(own.score, abs=1e-4))
    with pytest.raises(ValueError, match=r"3 states and 2 search scores"):
        pipeline.surest_answer(PROMPTS[0], memory=states, search_scores=[1.0, 0.0], **OPTIONS)


def test_surest_weighs_support_against_search_scores():
    assert surest([0.2, 0.9, 0.9]) == 1
    assert surest([0.2, 0.9, 0.9], [0.0, 0.0, 0.0]) == 1
    assert surest([0.9, 0.99], [5.0, 1.0]) == 0  # slightly more support does not make up for a fifth of the best score
    assert surest([0.001, 0.99], [5.0, 1.0]) == 1
    assert surest([1.0, 0.0], [1.0, 3.0]) == 0


def test_support_of_several_prompts():
    pipeline = make(refusal="no idea")
    states = pipeline.write(CONTEXTS)
    own = [pipeline.support(prompt, memory=state)[0] for prompt, state in zip(PROMPTS, states, strict=True)]
    assert pipeline.support(PROMPTS, memory=states) == pytest.approx(own, abs=1e-4)
    assert pipeline.support(PROMPTS, memory=states[1])[1] == pytest.approx(own[1], abs=1e-4)


def test_without_a_refusal_the_likeliest_answer_wins():
    pipeline = make()
    states = pipeline.write(CONTEXTS)
    each = [pipeline.generate(PROMPTS[0], memory=state, return_scores=True, **OPTIONS)[0] for state in states]
    best = max(range(3), key=lambda i: each[i].score)
    found = pipeline.surest_answer(PROMPTS[0], memory=states, **OPTIONS)
    assert (found.text, found.state) == (each[best].text, best)
    with pytest.raises(ValueError, match="not trained to refuse"):
        pipeline.support(PROMPTS[0], memory=states)


TWO = [[3, 4], [5]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("queries", "answers", "error", "message"),
    [
        (TWO, [[6]], ValueError, "got 2 queries and 1 answer"),
        ([], [], ValueError, "There is no query to read"),
        (TWO, [[6], []], ValueError, "Answer 1 is empty"),
        (TWO, [[6], [1000]], ValueError, "answers .* ids from 3 to 1000, but the model knows 0 to 60"),
        ([[3, -1], [5]], TWO, ValueError, "token ids from -1 to 5"),
        ([[3], ["w"]], TWO, TypeError, "Query 1 with its answer must be token ids"),
        ([[3], [0.5]], TWO, TypeError, "integer token ids"),
        ([[3], [3] * 93], [[4], [5, 6]], ValueError, "has 94 tokens, but at most 93 are allowed: .* 96 positions"),
    ],
)  # fmt: skip
def test_invalid_queries_and_answers_are_refused(architecture, queries, answers, error, message):
    model = make(architecture).model
    state = model.write(tokens(1, 5))
    assert model.log_likelihood([[3] * 93], [[4]], state).isfinite().all()  # the last token is not read
    with pytest.raises(error, match=message):
        model.log_likelihood(queries, answers, state)


def test_states_side_by_side_leave_fewer_positions():
    model = make("gpt2").model
    states, index = model.write(tokens(2, 5)), torch.tensor([[0, 1]])
    assert model.log_likelihood([[3] * 90], [[4]], states, context_index=index).isfinite().all()
    with pytest.raises(ValueError, match="has 91 tokens, but at most 90 are allowed"):
        model.log_likelihood([[3] * 91], [[4]], states, context_index=index)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_question_without_room_for_the_refusal_is_refused(architecture):
    pipeline = make(architecture, refusal="w1 w2 w3 w4 w5")
    state = pipeline.write(CONTEXTS[0])
    with pytest.raises(ValueError, match=r"A query with its answer .* has 96 tokens, but at most 93 are allowed"):
        pipeline.support(tiny_text(91), memory=state)


def test_invalid_score_settings_are_refused():
    with pytest.raises(ValueError, match="needs a memory"):
        make().generate(PROMPTS, return_scores=True)
    for wrong in (1.0, (1.0,), (0.0, 1.0), (1.0, float("nan")), "ab"):
        with pytest.raises(ValueError, match="score_calibration must be two finite numbers"):
            GradMemConfig(score_calibration=wrong)
    for nothing in ("", "  ", 3):
        with pytest.raises(ValueError, match="refusal must be a non-empty text"):
            GradMemConfig(refusal=nothing)
