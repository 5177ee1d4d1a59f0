"""Tokens of documents joined end to end, rows of them as the model reads them, and the order of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .options import BOUNDARIES

NO_LABEL = -100  # what the loss of transformers leaves out


class Vocabulary(NamedTuple):
    """`size`: a tokenizer's largest id plus one. `num_symbols`: how many different tokens text can become, with the
    end of a document (ByT5: 384 and 257)."""

    size: int
    num_symbols: int

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype("uint16" if self.size <= 1 << 16 else "uint32")


class Tokens:
    """Documents joined end to end, each followed by the end-of-sequence token; read-only, usually in mapped files.

    Args:
        tokens: [N] uint16 or uint32.
        starts: [D] int64, index in `tokens` of each document's first token; rises strictly from 0.
        document_bytes: [D] int64, UTF-8 bytes of each document's text.
        vocabulary: what the ids can be.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, document_bytes: np.ndarray, vocabulary: Vocabulary):
        self.tokens, self.starts, self.document_bytes, self.vocabulary = tokens, starts, document_bytes, vocabulary
        self._files: tuple[Path, str] | None = None

    @classmethod
    def open(cls, folder: Path, side: str, vocabulary: Vocabulary) -> Tokens:
        """Map the files `{side}.tokens`, `{side}.starts` and `{side}.bytes` of a folder into memory."""
        kinds = {"tokens": vocabulary.dtype, "starts": np.dtype("int64"), "bytes": np.dtype("int64")}
        # As plain arrays over the mapped files: slicing np.memmap costs several times more.
        arrays = (np.asarray(np.memmap(folder / f"{side}.{name}", kind, mode="r")) for name, kind in kinds.items())
        opened = cls(*arrays, vocabulary)
        opened._files = folder, side
        return opened

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapped files are mapped again by a worker; pickled as arrays they would be copied as a whole.
        if self._files is not None:
            return Tokens.open, (*self._files, self.vocabulary)
        return Tokens, (self.tokens, self.starts, self.document_bytes, self.vocabulary)

    @property
    def num_documents(self) -> int:
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return int(self.document_bytes.sum())

    def rows(self, seq_len: int, boundaries: str = "joined") -> Rows:
        """Rows of `seq_len` tokens, without the incomplete last one; `boundaries` is `joined` or `marked`."""
        return Rows(self, seq_len, boundaries)


class Rows(Dataset):
    """Rows of `seq_len` tokens as inputs of the model, which shifts the labels itself. Can be sent to other processes.

    Args:
        tokens: the documents.
        seq_len: tokens in a row, at least 2.
        boundaries: `joined`: a row is text like any other. `marked`: a row also says where documents begin (`seq_idx`),
            and the first token of each document is not predicted.
        num_rows: the first so many; all by default.
    """

    def __init__(self, tokens: Tokens, seq_len: int, boundaries: str = "joined", num_rows: int | None = None):
        if seq_len < 2:
            raise ValueError(f"seq_len={seq_len} must be at least 2: a row predicts each token from those before it")
        if boundaries not in BOUNDARIES:
            raise ValueError(f"boundaries={boundaries!r} must be one of {BOUNDARIES}")
        self.tokens, self.seq_len, self.boundaries = tokens, seq_len, boundaries
        whole = tokens.num_tokens // seq_len
        self.num_rows = whole if num_rows is None else min(num_rows, whole)

    def __len__(self) -> int:
        return self.num_rows

    def head(self, num_rows: int) -> Rows:
        """The first `num_rows` rows, or all if there are fewer."""
        return Rows(self.tokens, self.seq_len, self.boundaries, min(num_rows, self.num_rows))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, int64 [seq_len]; when marked, `seq_idx` too, int64 [seq_len]: the index of each
        token's document within the row, counted from 0, with the label −100 at the first token of each document."""
        begin = self._begin(index)
        input_ids = torch.from_numpy(self.tokens.tokens[begin : begin + self.seq_len].astype(np.int64))
        if self.boundaries == "joined":
            return {"input_ids": input_ids, "labels": input_ids.clone()}
        first, last = self._documents(begin)
        begins_here = np.zeros(self.seq_len, dtype=bool)
        offsets = self.tokens.starts[first:last] - begin
        begins_here[offsets[offsets >= 0]] = True
        seq_idx = np.cumsum(begins_here, dtype=np.int64) - begins_here[0]
        labels = input_ids.masked_fill(torch.from_numpy(begins_here), NO_LABEL)
        return {"input_ids": input_ids, "labels": labels, "seq_idx": torch.from_numpy(seq_idx)}

    def token_bytes(self, index: int) -> Tensor:
        """UTF-8 bytes of text that each token of a row stands for, float32 [seq_len]: 0 for the end-of-sequence tokens
        after documents, else the average of the document, which is exact when tokens are bytes (1 for each) and exact
        in sum over a document otherwise."""
        begin = self._begin(index)
        first, last = self._documents(begin)
        ends = np.append(self.tokens.starts[first + 1 : last + 1], self.tokens.num_tokens)[: last - first]
        lengths = ends - self.tokens.starts[first:last] - 1  # without the end-of-sequence token
        average = self.tokens.document_bytes[first:last] / np.maximum(lengths, 1)
        counts = np.diff(np.clip(ends, begin, begin + self.seq_len), prepend=begin)
        result = np.repeat(average, counts).astype(np.float32)
        last_tokens = ends - 1 - begin
        result[last_tokens[last_tokens < self.seq_len]] = 0
        return torch.from_numpy(result)

    def _begin(self, index: int) -> int:
        """Where row `index` begins in the tokens. Raises IndexError, which ends a loop over the rows."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} is not one of 0 to {self.num_rows - 1}")
        return int(index) * self.seq_len

    def _documents(self, begin: int) -> tuple[int, int]:
        """First document with a token in the row that begins at `begin`, and one past the last."""
        first = int(np.searchsorted(self.tokens.starts, begin, side="right")) - 1
        return first, int(np.searchsorted(self.tokens.starts, begin + self.seq_len, side="left"))


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
