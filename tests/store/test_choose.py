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


class TestRefusals:
    @pytest.mark.parametrize("k", [0, -1, 2.0, True])
    def test_an_invalid_k(self, filled, pipeline, k):
        with pytest.raises(ValueError, match="k, the number of states to return, must be an integer"):
            filled.choose(pipeline, "heron", k)

    def test_a_huge_k_returns_all_there_are(self, filled, pipeline):
        assert len(filled.choose(pipeline, "heron", 2**70)) == 2

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
