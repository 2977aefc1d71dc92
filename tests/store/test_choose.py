"""MemoryStore.choose: the states whose texts a question is about, by words and by an embedding."""

import pytest
import torch
from stores import tiny_pipeline

from gradmem_adapter import MemoryState
from gradmem_adapter.store import Embedding, MemoryStore

PASSAGES = [
    "The grey heron nests in tall trees near the lake, and feeds on frogs.",
    "Herons were hunted with falcons at the court of Burgundy.",
    "The lighthouse of Genoa was built in 1543 by order of the doge.",
    "What happens to a glacier that melts is what geologists argue about.",
    "Frogs lay their eggs in shallow water.",
    "Der Reiher nistet hoch in den Bäumen über dem Café.",
]


@pytest.fixture
def filled(store, pipeline):
    sources = ["birds.txt", "hunting.txt", "genoa.txt", "ice.txt", "frogs.txt", "vogel.txt"]
    store.add(pipeline, PASSAGES, sources=sources)
    return store


def texts(choices):
    return [PASSAGES.index(choice.entry.text) for choice in choices]


def letters(calls):
    """An embedding that counts letters, and notes how many texts it was given."""

    def embed(batch):
        calls.append(len(batch))
        return [[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in batch]

    return Embedding("letters", embed)


class TestWords:
    @pytest.mark.parametrize(
        ("query", "best"),
        [
            ("Where does the heron nest?", 0),
            ("Who hunted a heron with falcons?", 1),
            ("When was the lighthouse built?", 2),
            ("What do frogs eat or lay in the water?", 4),
            ("Wo nistet der Reiher?", 5),
            ("CAFE", 5),
            ('"NEAR(heron* OR AND lake:', 0),
        ],
    )
    def test_the_best_text_comes_first(self, filled, pipeline, query, best):
        assert texts(filled.choose(pipeline, query))[0] == best

    def test_question_words_do_not_count(self, filled, pipeline):
        assert texts(filled.choose(pipeline, "What is the lighthouse?")) == [2]

    def test_a_query_of_question_words_alone_searches_for_them(self, filled, pipeline):
        assert texts(filled.choose(pipeline, "What happens?"))[0] == 3
        assert texts(filled.choose(pipeline, "What about that?")) == [3]

    def test_at_most_k_states_are_returned_best_first(self, filled, pipeline):
        choices = filled.choose(pipeline, "heron frogs lake water", k=2)
        assert len(choices) == 2
        assert choices[0].score > choices[1].score > 0

    @pytest.mark.parametrize("query", ["quantum", "", "?!"])
    def test_nothing_is_chosen_for_words_in_no_text(self, filled, pipeline, query):
        assert filled.choose(pipeline, query) == []

    def test_the_search_can_be_limited_to_one_source(self, filled, pipeline):
        filled.add(pipeline, PASSAGES[:1], sources="copy.txt")
        (choice,) = filled.choose(pipeline, "heron", source="copy.txt")
        assert (choice.entry.source, choice.entry.text) == ("copy.txt", PASSAGES[0])
        assert len(filled.choose(pipeline, "heron")) == 2

    def test_chosen_states_can_be_read_side_by_side(self, filled, pipeline):
        chosen = filled.choose(pipeline, "heron frogs")
        memory = MemoryState.concat([filled.get(choice.entry.key) for choice in chosen])
        assert memory.num_memory_tokens == 3 * len(chosen)
        assert len(pipeline.generate("heron frogs", memory=memory, max_new_tokens=2)) == 1


class TestEmbedding:
    def test_texts_are_embedded_once(self, filled, pipeline):
        calls = []
        embedding = letters(calls)
        first = filled.choose(pipeline, "heron", embedding=embedding)
        assert filled.choose(pipeline, "heron", embedding=embedding) == first
        filled.add(pipeline, "Another text on herons.")
        filled.choose(pipeline, "heron", embedding=embedding)
        assert calls == [1, 6, 1, 1, 1]

    def test_vectors_are_reread_only_when_the_index_has_changed(self, filled, pipeline):
        embedding = letters([])
        best = filled.choose(pipeline, "heron", k=1, embedding=embedding)
        known = filled.index.vectors
        assert filled.choose(pipeline, "heron", k=1, embedding=embedding) == best
        assert filled.index.vectors is known
        other = MemoryStore(filled.path)
        (last,) = other.entries("vogel.txt")
        other.delete([last.key])  # its number in the index goes to the next one
        other.add(pipeline, "heron heron heron")
        for store in (filled, other, MemoryStore(filled.path)):
            (choice,) = store.choose(pipeline, "heron", k=1, embedding=embedding)
            assert choice.entry.text == "heron heron heron"
        filled.rebuild()
        assert filled.choose(pipeline, "heron", k=7, embedding=embedding)[0].entry.text == "heron heron heron"

    def test_the_score_is_the_share_of_bm25_and_the_cosine(self, filled, pipeline):
        words = filled.choose(pipeline, "heron frogs", k=6)
        embedding = letters([])
        near = embedding.vectors(PASSAGES) @ embedding.vectors(["heron frogs"])[0]
        share = {choice.entry.text: choice.score / words[0].score for choice in words}
        expected = torch.tensor([share.get(text, 0.0) for text in PASSAGES]) + near
        choices = filled.choose(pipeline, "heron frogs", k=6, embedding=embedding)
        assert texts(choices) == expected.argsort(descending=True).tolist()
        found = torch.tensor([choice.score for choice in choices])
        torch.testing.assert_close(found, expected.sort(descending=True).values)

    def test_it_finds_texts_with_none_of_the_words(self, filled, pipeline):
        same = "qatspp"
        embedding = Embedding(
            "topic", lambda batch: [[1.0, 0.0] if "Genoa" in t or t == same else [0.0, 1.0] for t in batch]
        )
        assert texts(filled.choose(pipeline, same, k=1, embedding=embedding)) == [2]

    @pytest.mark.parametrize("kind", [list, torch.tensor])
    def test_queries_can_have_their_own_embedding(self, filled, pipeline, kind):
        embedding = Embedding(
            "topic",
            lambda batch: [[1.0, 0.0] if "Genoa" in t else [0.0, 1.0] for t in batch],
            lambda query: kind([2.0, 0.0]),
        )
        assert texts(filled.choose(pipeline, "qatspp", k=1, embedding=embedding)) == [2]

    @pytest.mark.parametrize(
        "embed", [lambda batch: [[1.0]], lambda batch: [1.0] * len(batch), lambda batch: [[float("nan")]] * len(batch)]
    )
    def test_an_invalid_embedding_is_refused(self, filled, pipeline, embed):
        with pytest.raises(ValueError, match="'broken' must return one vector of finite numbers for each text"):
            filled.choose(pipeline, "heron", embedding=Embedding("broken", embed))

    def test_another_model_of_the_same_name_is_refused(self, filled, pipeline):
        filled.choose(pipeline, "heron", embedding=letters([]))
        with pytest.raises(ValueError, match="Give each model its own name"):
            filled.choose(pipeline, "heron", embedding=Embedding("letters", lambda batch: [[1.0]] * len(batch)))


class TestLikelihood:
    def test_the_state_that_best_explains_the_question_comes_first(self, filled, pipeline):
        """Scores and likelihoods of the whole shortlist decide; `forward` gives the expected likelihoods."""
        query = "w3 w4 heron frogs water"
        words = filled.choose(pipeline, query, k=6)
        chat, _ = pipeline.format_query(query)
        before, own, _ = chat.partition(query)
        before, own = (pipeline.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, own))
        expected = {}
        for choice in words:
            labels = torch.tensor([[-100] * len(before) + own])
            memory = filled.get(choice.entry.key)
            loss = pipeline.model(torch.tensor([before + own]), labels=labels, memory=memory).loss.item()
            expected[choice.entry.key] = choice.score / words[0].score - 0.4 * loss
        found = filled.choose(pipeline, query, k=2, shortlist=6)
        assert [choice.entry.key for choice in found] == sorted(expected, key=expected.get, reverse=True)[:2]
        assert [choice.score for choice in found] == pytest.approx(
            sorted(expected.values(), reverse=True)[:2], abs=1e-4
        )

    def test_a_shortlist_of_k_keeps_the_choice(self, filled, pipeline):
        best = filled.choose(pipeline, "heron frogs", k=2)
        found = filled.choose(pipeline, "heron frogs", k=2, shortlist=2)
        assert {choice.entry.key for choice in found} == {choice.entry.key for choice in best}
        assert filled.choose(pipeline, "quantum", shortlist=9) == []

    @pytest.mark.parametrize("query", ["quantum", ""])
    def test_scores_of_zero_or_below(self, filled, pipeline, monkeypatch, query):
        """Dividing by the best score would reverse the order of negative scores, and is undefined for 0."""
        monkeypatch.setattr(pipeline.model, "log_likelihood", lambda before, *_: torch.zeros(len(before)))
        for at, best in (([0.0, 0.0], 0.0), ([0.0, 1.0], None)):
            embedding = Embedding(
                f"to {at}", lambda batch, at=at: [at if t == query else [-1.0 - len(t), 9.0 - len(t)] for t in batch]
            )
            plain = filled.choose(pipeline, query, k=6, embedding=embedding)
            found = filled.choose(pipeline, query, k=6, embedding=embedding, shortlist=6)
            assert texts(found) == texts(plain)
            assert best is None or found[0].score == best

    def test_a_word_of_the_format_is_not_mistaken_for_the_question(self, filled, monkeypatch):
        asked = []
        pipeline = tiny_pipeline(query_format="QUERY w1 {query}")
        monkeypatch.setattr(
            pipeline.model, "log_likelihood", lambda before, *_: asked.append(before[0]) or torch.zeros(len(before))
        )
        filled.choose(pipeline, "heron", shortlist=4)
        assert asked == [pipeline.tokenizer("QUERY w1 ")["input_ids"]]


class TestRefusals:
    @pytest.mark.parametrize("shortlist", [1, -1, 2.5])
    def test_a_shortlist_shorter_than_k(self, filled, pipeline, shortlist):
        with pytest.raises(ValueError, match=r"shortlist must be 0 or an integer of at least k \(2\)"):
            filled.choose(pipeline, "heron", 2, shortlist=shortlist)

    @pytest.mark.parametrize("k", [0, -1, 2.0, True])
    def test_an_invalid_k(self, filled, pipeline, k):
        with pytest.raises(ValueError, match="k, the number of states to return, must be an integer"):
            filled.choose(pipeline, "heron", k)

    def test_a_huge_k_returns_all_there_are(self, filled, pipeline):
        assert (
            len(filled.choose(pipeline, "heron", 2**70))
            == len(filled.choose(pipeline, "heron", 1, shortlist=2**70)) + 1
        )

    def test_a_query_that_is_not_text(self, filled, pipeline):
        with pytest.raises(TypeError, match="The query must be a text, got bytes"):
            filled.choose(pipeline, b"heron")

    def test_a_query_with_half_a_character(self, filled, pipeline):
        with pytest.raises(ValueError, match="half a character"):
            filled.choose(pipeline, "heron \ud800")

    def test_states_of_another_model(self, filled, pipeline):
        other = tiny_pipeline(seed=1)
        with pytest.raises(ValueError, match="This store has 6 states, but none was written by this model"):
            filled.choose(other, "heron")
        key = filled.add(other, PASSAGES[1])[0]
        assert [choice.entry.key for choice in filled.choose(other, "heron")] == [key]

    def test_a_store_without_texts(self, tmp_path, pipeline):
        store = MemoryStore(tmp_path / "bare", keep_text=False)
        assert store.choose(pipeline, "heron") == []
        store.add(pipeline, PASSAGES)
        with pytest.raises(ValueError, match="keeps no texts"):
            store.choose(pipeline, "heron")
        written = {entry.key: entry.written for entry in store.entries()}
        MemoryStore(store.path).add(pipeline, PASSAGES)
        assert store.choose(pipeline, "heron")
        assert {entry.key: entry.written for entry in store.entries()} == written


class TestOfWholeTexts:
    @pytest.fixture
    def halved(self, store, pipeline):
        """Four of a document's nine segments, which match a question best, and two whole texts that match less."""
        parts = ["heron one", "heron two", "heron three", "heron four"]
        places = [(i, i + 1) for i in range(4)]
        store.add(pipeline, parts, sources="a part", offsets=places, metadata=[{"segments": 9}] * 4)
        store.add(pipeline, ["heron two", "heron, after a longer text"], sources=["b", "c"])
        return store

    @pytest.mark.parametrize("how", [{}, {"embedding": letters([])}])
    def test_incomplete_documents_do_not_displace_whole_ones(self, halved, pipeline, how):
        assert {one.entry.source for one in halved.choose(pipeline, "heron", 4, **how)} == {"a part"}
        chosen = halved.choose(pipeline, "heron", 2, whole=True, **how)
        assert [one.entry.source for one in chosen] == ["b", "c"]
        assert all(halved.is_whole(one.entry) for one in chosen)
        assert len(halved.choose(pipeline, "heron", 1, whole=True, **how)) == 1

    def test_the_search_can_be_limited_to_keys(self, halved, pipeline):
        two = {entry.key for entry in halved.entries("a part") if entry.text in ("heron two", "heron four")}
        for how in ({}, {"embedding": letters([])}):
            assert {one.entry.key for one in halved.choose(pipeline, "heron", keys=two, **how)} == two
        assert [one.entry.key for one in halved.choose(pipeline, "heron", keys=min(two))] == [min(two)]
        (one,) = halved.choose(pipeline, "heron", keys=two, whole=True)
        assert one.entry.source == "b"
