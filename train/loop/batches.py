"""How the rows of a step are shared out among groups of processes and forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from torch.utils.data import Sampler

from ..data import RowOrder
from .distributed import Layout


class StepBatches(Sampler[list[int]]):
    """The batches of one group of processes: `batch_size / (micro_batch_size · data_size)` for each step.

    A step takes the next `batch_size` rows of the order, whatever the layout; each group gets an equal stretch of them.
    So runs with other numbers of processes read the same rows in the same steps.
    """

    def __init__(self, order: RowOrder, *, batch_size: int, micro_batch_size: int, layout: Layout):
        self.order, self.batch_size, self.micro_batch_size = order, batch_size, micro_batch_size
        self.share = batch_size // layout.data_size
        self.first = layout.data_index * self.share

    def __len__(self) -> int:
        return len(self.order) // self.batch_size * (self.share // self.micro_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = iter(self.order)
        while len(step := list(islice(rows, self.batch_size))) == self.batch_size:
            own = step[self.first : self.first + self.share]
            for start in range(0, self.share, self.micro_batch_size):
                yield own[start : start + self.micro_batch_size]
