"""Several processes at one compression, on one machine or many: torchrun starts them.

Every process runs the same code; what is shared out is asked for here. Outside of `joined`, and
wherever a process is alone, all of it is one process's.
"""

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from calr.errors import CalrError

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)  # one process may write or measure while the others wait

_size, _rank = 1, 0


def size() -> int:
    """Return how many processes there are."""
    return _size


def rank() -> int:
    """Return the number of this one."""
    return _rank


def first() -> bool:
    """Tell whether this is the process that writes and prints what all have found."""
    return _rank == 0


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun has started; alone where it has started no others.

    Raises CalrError when another process ends before this one is done.
    """
    global _size, _rank
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _one_sentence():
        dist.init_process_group(backend, timeout=PATIENCE)
        _size, _rank = dist.get_world_size(), dist.get_rank()
        try:
            yield
        finally:
            _size, _rank = 1, 0
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def place_of(device: str) -> str:
    """Return the device of this process, where each of a machine's has a GPU of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and _size > 1 else device


def mine(items: Any) -> Any:
    """Return every size-th of a sequence or of a tensor's rows, beginning with the rank-th."""
    return items[_rank::_size]


def share(items: Sequence[T], costs: Sequence[float]) -> list[T]:
    """Return what of some items is this process's, in their order: the dearest go first, each to
    the process that is idlest.

    >>> share(["a", "b"], [1, 2])
    ['a', 'b']
    """
    loads, own = [0.0] * _size, set()
    for i in sorted(range(len(items)), key=lambda i: -costs[i]):
        idlest = min(range(_size), key=lambda process: loads[process])
        loads[idlest] += costs[i]
        if idlest == _rank:
            own.add(i)
    return [item for i, item in enumerate(items) if i in own]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over the processes, which all name them in one order."""
    for tensor in tensors if _size > 1 else ():
        dist.all_reduce(tensor)


def agree(value: T) -> T:
    """Return what the first process has as a value."""
    values = [value]
    if _size > 1:
        dist.broadcast_object_list(values)
    return values[0]


def wait() -> None:
    """Wait until all processes are here."""
    if _size > 1:
        dist.barrier()


@contextmanager
def first_then_others() -> Iterator[None]:
    """Let the first process go through the block, and then the others, who find what it wrote."""
    if _rank:
        wait()
    yield
    if not _rank:
        wait()


def gather(found: dict[Any, T]) -> dict[Any, T]:
    """Return what all processes found, each under keys of its own."""
    if _size == 1:
        return found
    every: list[Any] = [None] * _size
    dist.all_gather_object(every, found)
    return {key: value for part in every for key, value in part.items()}


def require(windows: int, what: str) -> None:
    """Raise CalrError where some process would have no window of text."""
    if windows < _size:
        raise CalrError(
            f"{what}={windows}: fewer windows than the {_size} processes; raise it, or start fewer"
        )


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise CalrError(
            f"process {_rank}: another process of this job has ended or cannot be reached (its own "
            f"message says why): {str(error).split('. ')[0]}"
        ) from error
