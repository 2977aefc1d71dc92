"""Segments of a long text: where they end, how they overlap, and how little is read ahead."""

import itertools

import pytest
import torch
from tiny import tiny_text, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gradmem_adapter.segments import segments

WORDS = tiny_tokenizer()
PROSE = "w1 w2 w3. w4 w5!\n\nw6 w7 w8 w9\nw10 w11? w12 w13 w14 w15 w16 w17"


def byte_tokenizer():
    """A token for each byte, so that most characters outside ASCII have several."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def cut(text, limit, overlap=0, tokenizer=WORDS):
    return [segment.text for segment in segments(text, tokenizer, limit, overlap)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w1 w2 w3\n\nw4. w5 w6 w7", ["w1 w2 w3", "w4. w5 w6 w7"]),  # a paragraph end is preferred to a sentence end
        ("w1 w2 w3. w4 w5 w6 w7", ["w1 w2 w3.", "w4 w5 w6 w7"]),
        ('w1 w2 w3.") w4 w5 w6 w7', ['w1 w2 w3.")', "w4 w5 w6 w7"]),
        ("w1 w2 w3\nw4 w5 w6 w7", ["w1 w2 w3", "w4 w5 w6 w7"]),
        ("w1 w2 w3 w4 w5 w6 w7", ["w1 w2 w3 w4", "w5 w6 w7"]),
        ("w1. w2 w3 w4 w5 w6 w7", ["w1. w2 w3 w4", "w5 w6 w7"]),  # else the segment would be too short
        ("  w1 \n", ["w1"]),
        (" \n\n ", []),
        ("", []),
    ],
)
def test_where_segments_end(text, expected):
    assert cut(text, 4) == expected


def test_sentences_end_segments_in_scripts_without_spaces():
    assert cut("東京は晴れ。明日は雨です。", 8 * 3, tokenizer=byte_tokenizer()) == ["東京は晴れ。", "明日は雨です。"]


@pytest.mark.parametrize("limit", [1, 2, 5, 9])
@pytest.mark.parametrize("text", [PROSE, "w1", " w1 w2 ", "w1\n" * 9, tiny_text(200), "w1 w2" + " " * 500 + "w3 w4 w5"])
def test_nothing_but_white_space_is_lost(text, limit):
    found = list(segments(text, WORDS, limit))
    assert "".join("".join(segment.text for segment in found).split()) == "".join(text.split())
    for segment in found:
        assert segment.text == text[segment.start : segment.end] == segment.text.strip()
        assert 0 < segment.tokens == len(WORDS(segment.text)["input_ids"]) <= limit
    assert all(one.end <= other.start for one, other in itertools.pairwise(found))


def test_special_tokens_count():
    tokenizer = tiny_tokenizer(bos=True)
    found = list(segments(tiny_text(20), tokenizer, 5))
    assert [segment.tokens for segment in found] == [5] * 5
    with pytest.raises(ValueError, match="at least 2 tokens, 1 of them special, got 1"):
        segments("w1", tokenizer, 1)


def test_the_last_segments_are_of_equal_length():
    assert [len(text.split()) for text in cut(tiny_text(80), 48)] == [40, 40]
    assert [len(text.split()) for text in cut(tiny_text(1000), 48)][:3] == [48, 48, 48]


def test_segments_overlap_by_sentences_or_words_but_not_across_paragraphs():
    assert cut("w1 w2 w3 w4 w5 w6. w7 w8 w9 w10 w11 w12", 9, 2) == ["w1 w2 w3 w4 w5 w6.", "w5 w6. w7 w8 w9 w10 w11 w12"]
    assert cut("w1 w2 w3 w4 w5. w6. w7 w8 w9 w10 w11 w12 w13", 9, 2)[1].startswith("w6. w7")
    assert cut("w1 w2 w3 w4 w5 w6.\n\nw7 w8 w9 w10 w11 w12", 9, 2) == ["w1 w2 w3 w4 w5 w6.", "w7 w8 w9 w10 w11 w12"]


@pytest.mark.parametrize("end", ["\r\n\r\n", " \n\n", "\t\n \n"])
def test_a_finished_paragraph_is_not_repeated_whatever_its_white_space(end):
    assert cut(f"w1 w2 w3 w4 w5 w6.{end}w7 w8 w9 w10 w11 w12", 9, 2) == ["w1 w2 w3 w4 w5 w6.", "w7 w8 w9 w10 w11 w12"]


def test_no_segment_is_only_overlap():
    assert cut(". 。京 ", 6, 1, tokenizer=byte_tokenizer()) == [". 。", "京"]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_pieces_that_a_text_comes_in_do_not_matter(size):
    text = " \n" + PROSE * 20
    expected = list(segments(text, WORDS, 7, 1))
    assert list(segments([text[i : i + size] for i in range(0, len(text), size)], WORDS, 7, 1)) == expected
    assert list(segments(iter(text.splitlines(keepends=True)), WORDS, 7, 1)) == expected


def test_a_text_can_be_given_as_token_ids():
    tokenizer, text = byte_tokenizer(), "Zoë paid 5 €. Then she left.\n\nIt rained all day, and 🙂 was all she wrote."
    expected = list(segments(text, tokenizer, 20, 4))
    ids = tokenizer(text)["input_ids"]
    assert list(segments(ids, tokenizer, 20, 4)) == expected
    assert list(segments(iter(torch.tensor(ids)), tokenizer, 20, 4)) == expected
    for text in ("broken \ufffd", "\ufffd", "€"):
        assert "".join(segment.text for segment in segments(tokenizer(text)["input_ids"], tokenizer, 20)) == text
    assert [segment.text for segment in segments(tokenizer("a €")["input_ids"][:-1], tokenizer, 20)] == ["a \ufffd"]
    for wrong in ("a", 2.5, -1, 10**6, None):
        with pytest.raises(TypeError, match=f"Element 1 of the text is {wrong!r}, which is not a token id"):
            list(segments([1, wrong], tokenizer, 20))


def test_a_character_is_never_split():
    tokenizer = byte_tokenizer()
    assert cut("🙂🙂🙂", 6, tokenizer=tokenizer) == ["🙂", "🙂", "🙂"]
    with pytest.raises(ValueError, match="'🙂' alone has more than 3 tokens"):
        cut("🙂", 3, tokenizer=tokenizer)


def test_no_more_is_read_than_the_next_segment_needs():
    taken = 0

    def lines():
        nonlocal taken
        while True:
            taken += 1
            yield f"w{taken % 40} w2 w3.\n"

    endless = segments(lines(), WORDS, 30)
    for _ in range(5):
        next(endless)
    near = taken
    for _ in range(100):
        next(endless)
    assert taken < near + 100 * 12


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, WORDS, 5), TypeError, "or its token ids, got int"),
        ((b"w1", WORDS, 5), TypeError, "or its token ids, got bytes"),  # which is also a series of numbers
        ((WORDS("w1"), WORDS, 5), TypeError, "or its token ids, got BatchEncoding"),  # whose keys would be read
        (({"w1"}, WORDS, 5), TypeError, "or its token ids, got set"),
        ((["w1", 3], WORDS, 5), TypeError, "Piece 1 of the text is a int"),
        (("w1 \ud83d", WORDS, 5), ValueError, "The text has half a character.*at position 3"),
        ((["w1", "w1 \ud83d"], WORDS, 5), ValueError, "Piece 1 of the text has half a character"),
        (("w1", WORDS, 0), ValueError, "at least 1 token,"),
        (("w1", WORDS, 2.5), ValueError, "at least 1 token,"),
        (("w1", WORDS, 8, 2), ValueError, "below a quarter of a segment of 8 tokens, got 2"),
        (("w1", WORDS, 8, -1), ValueError, "non-negative"),
    ],
)
def test_invalid_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        list(segments(*arguments))
