"""The one place that pads."""

import pytest
import torch

from gradmem_adapter.ops.padding import append, move_padding_right, pad, part_means

ROWS = [[5, 6, 7], [8], []]


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_rows_are_padded_on_either_side(kind):
    rows = [kind(row) for row in ROWS[:2]]
    ids, mask = pad(rows, "right", 9)
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [8, 9, 9]], [[1, 1, 1], [1, 0, 0]])
    ids, mask = pad(rows, "left")
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    assert ids.dtype == mask.dtype == torch.long


def test_an_empty_row_is_all_padding():
    ids, mask = pad(ROWS, "right")
    assert ids.dtype == torch.long
    assert mask.sum(1).tolist() == [3, 1, 0]


def test_rows_of_vectors_are_padded_with_vectors():
    vectors, mask = pad([torch.ones(2, 3), torch.ones(1, 3)], "left")
    assert vectors.shape == (2, 2, 3)
    assert vectors.sum(2).tolist() == [[3, 3], [0, 3]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_padding_anywhere_is_moved_to_the_right():
    ids = torch.tensor([[0, 0, 5, 6], [7, 0, 8, 0]])
    rows, lengths = move_padding_right(ids, (ids > 0).long())
    assert (rows.tolist(), lengths.tolist()) == ([[5, 6], [7, 8]], [2, 2])
    rows, lengths = move_padding_right(torch.tensor([[0, 5, 6], [0, 0, 8]]), torch.tensor([[0, 1, 1], [0, 0, 1]]))
    assert (rows.tolist(), lengths.tolist()) == ([[5, 6], [8, 8]], [2, 1])  # its own token, not the pad token
    rows, lengths = move_padding_right(ids, None)
    assert torch.equal(rows, ids)
    assert lengths.tolist() == [4, 4]


def test_a_tail_is_appended_to_each_row_without_a_gap():
    rows, lengths = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([3, 1])
    joined, places = append(rows, lengths, torch.tensor([[1, 2], [3, 4]]))
    assert joined.tolist() == [[5, 6, 7, 1, 2], [8, 3, 4, 0, 0]]
    assert places.tolist() == [[3, 4], [1, 2]]


def test_part_means_split_each_row_evenly():
    values = torch.arange(8.0).view(2, 4, 1)
    means, counts = part_means(values, torch.tensor([4, 1]), 2)
    assert means[..., 0].tolist() == [[0.5, 2.5], [4.0, 0.0]]
    assert counts.tolist() == [2, 1]
