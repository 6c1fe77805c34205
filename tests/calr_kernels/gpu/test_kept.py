"""What is made of a tensor once, and launches that read tensors without waiting."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calr_kernels.gpu.kept import kept, settle


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.append(function.__name__)
        return function(*arguments, **(named or {}))


def between(*tensors):
    """What settle puts between."""
    with Operations() as operations:
        settle(*tensors)
    return operations.names


def test_is_made_once_and_anew_after_a_write_or_a_move():
    x, y = torch.ones(3), torch.ones(3)
    first = kept(x, torch.add, 1)
    assert kept(x, torch.add, 1) is first
    assert kept(x, torch.add, 2).tolist() == [3, 3, 3]
    assert kept(y, torch.add, 1) is not first
    x.mul_(5)
    assert kept(x, torch.add, 1).tolist() == [6, 6, 6]
    x.data = torch.zeros(3)
    assert kept(x, torch.add, 1).tolist() == [1, 1, 1]


def test_of_inference_tensors_nothing_is_kept():
    with torch.inference_mode():
        x = torch.ones(3)
        kept(x, torch.add, 1)
        x.mul_(5)
        assert kept(x, torch.add, 1).tolist() == [6, 6, 6]


def test_weights_that_were_just_written_are_waited_for():
    w, goal = torch.ones(3), torch.ones(2)
    assert len(between(w)) == 1
    assert between(w) == []
    w.mul_(2)
    assert len(between(w)) == 1
    assert len(between(w, goal)) == 1
    assert between(w, goal) == []
