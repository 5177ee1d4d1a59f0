"""The order in which rows are read, as a function of a seed and of how many tokens have been read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class RowOrder(Sampler[int]):
    """Indices of rows in endless epochs, each a permutation drawn from (seed, epoch).

    What is permuted are blocks of `block_len` tokens; a block is read as consecutive rows of `seq_len`. So the position
    in the data is one number, the tokens read so far, and a stage with rows of another length goes on where the one
    before stopped. The incomplete block at the end of the data is never read.

    Args:
        num_tokens: tokens of the data.
        seq_len: tokens in a row; divides block_len.
        block_len: tokens in a block: the longest `seq_len` of all stages.
        seed: of the order.
        start_tokens: tokens read before; a multiple of seq_len.
        num_rows: how many indices to give.

    Raises ValueError for sizes that break these rules, or data shorter than one block.
    """

    def __init__(
        self, num_tokens: int, *, seq_len: int, block_len: int, seed: int, start_tokens: int = 0, num_rows: int
    ):
        if block_len % seq_len:
            raise ValueError(f"seq_len={seq_len} must divide block_len={block_len}, the longest seq_len of all stages")
        if start_tokens % seq_len:
            raise ValueError(
                f"start_tokens={start_tokens} must be a multiple of seq_len={seq_len}; end the stage before at one"
            )
        if num_tokens < block_len:
            raise ValueError(f"the data has {num_tokens:,} tokens, less than one block of block_len={block_len}")
        self.seq_len, self.block_len, self.seed = seq_len, block_len, seed
        self.start_tokens, self.num_rows = start_tokens, num_rows
        self.num_blocks = num_tokens // block_len

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        rows_per_block = self.block_len // self.seq_len
        first = self.start_tokens // self.seq_len
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for position in range(first, first + self.num_rows):
            block, row = divmod(position, rows_per_block)
            if block // self.num_blocks != epoch:
                epoch = block // self.num_blocks
                order = np.random.default_rng([self.seed, epoch]).permutation(self.num_blocks)
            yield int(order[block % self.num_blocks]) * rows_per_block + row
