"""Stop strings, however a stream splits them into pieces."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gradmem_adapter.answering.stopping import cut_at_stop, pieces_until_stop


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abc", [], ("abc", False)),
        ("abc", ["x"], ("abc", False)),
        ("abcab", ["b"], ("a", True)),
        ("abcab", ["ca", "bc"], ("a", True)),
        ("abc", ["a"], ("", True)),
    ],
)
def test_a_text_is_cut_at_its_first_stop_string(text, stops, expected):
    assert cut_at_stop(text, stops) == expected


@given(st.lists(st.text("ab.", max_size=3), max_size=8), st.lists(st.text("ab.", min_size=1, max_size=3), max_size=3))
@example(pieces=[".", "b", "."], stops=["b", ".b."])
def test_a_stream_ends_where_the_whole_text_does(pieces, stops):
    shown = list(pieces_until_stop(iter(pieces), stops))
    assert ("".join(piece for piece, _ in shown), any(stopped for _, stopped in shown)) == cut_at_stop(
        "".join(pieces), stops
    )
