"""How the rows of a step are shared out among processes and forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from torch.utils.data import Sampler

from ..data import RowOrder


class StepBatches(Sampler[list[int]]):
    """The batches of one process: `batch_size / (micro_batch_size · num_processes)` for each step.

    A step takes the next `batch_size` rows of the order, whatever the number of processes; each process gets an equal
    stretch of them. So runs with other numbers of processes read the same rows in the same steps.
    """

    def __init__(
        self, order: RowOrder, *, batch_size: int, micro_batch_size: int, process: int = 0, num_processes: int = 1
    ):
        self.order, self.batch_size, self.micro_batch_size = order, batch_size, micro_batch_size
        self.share = batch_size // num_processes
        self.first = process * self.share

    def __len__(self) -> int:
        return len(self.order) // self.batch_size * (self.share // self.micro_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = iter(self.order)
        while len(step := list(islice(rows, self.batch_size))) == self.batch_size:
            own = step[self.first : self.first + self.share]
            for start in range(0, self.share, self.micro_batch_size):
                yield own[start : start + self.micro_batch_size]
