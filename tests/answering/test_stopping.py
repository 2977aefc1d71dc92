"""Stop strings, also where a growing text ends with a part of one."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gradmem_adapter.answering.stopping import cut_at_stop, settled


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
def test_the_settled_part_of_a_growing_text_never_changes(pieces, stops):
    whole, _ = cut_at_stop("".join(pieces), stops)
    for count in range(len(pieces)):
        assert whole.startswith(settled(cut_at_stop("".join(pieces[:count]), stops)[0], stops))
