"""Trees and fields of a run's state come back as they were."""

import torch

from dgrpo.trainer.checkpoint.state import decode, encode, share


def test_trees_come_back_as_they_were():
    tree = {
        "float": [0.1, float("inf"), 1e-300],
        "nested": {"tuple": (1, (True, None)), 3: "integer key", "__tuple__": "not a tag"},
        "tensors": [
            torch.tensor([1.5], dtype=torch.bfloat16),
            torch.tensor(True),
            torch.empty(0, 2),
        ],
    }
    text, tensors = encode(tree)
    back = decode(text, tensors)
    for got, expected in zip(back.pop("tensors"), tree.pop("tensors"), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert torch.equal(got, expected)
    assert back == tree


def test_entries_are_dealt_whole_and_in_order():
    parts = [share(list(range(7)), rank, 3) for rank in range(3)]
    assert parts == [[0, 1], [2, 3], [4, 5, 6]]
