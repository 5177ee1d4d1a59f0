"""Who reads what, without processes: parts cover a batch once, and neighbours agree about what crosses their cut."""

from __future__ import annotations

import random

import pytest
import torch

from modeling_tnt.context_plan import Part, part_columns, part_length, plan_part
from modeling_tnt.kernels.types import MemoryOptions
from modeling_tnt.packing import Packing, plan_packing

TNT = (MemoryOptions(2048, is_global=True), MemoryOptions(8, 2048), MemoryOptions(32, 1024))


@pytest.mark.parametrize("length, ranks, multiple, expected", [
    (16384, 4, None, 4096),  # whole shards and global chunks
    (16384, 3, None, 6144),  # 1.125 times the mean
    (16384, 7, None, 2368),  # 4096 would leave ranks idle, so would 2048: local chunks
    (100, 3, None, 34),  # two chunks of 32 would leave the third rank idle
    (100, 3, 1, 34), (100, 3, 48, 48), (3, 4, 1, 1),
])  # fmt: skip
def test_length_of_a_part(length: int, ranks: int, multiple: int | None, expected: int):
    assert part_length(length, ranks, TNT, multiple) == expected


def make_whole(kind: str, seed: int) -> tuple[Packing | None, int, int]:
    """A packing of a random batch, its rows and columns."""
    draw = random.Random(seed)
    rows, length = draw.randint(1, 3), draw.randint(1, 23)
    given: dict[str, torch.Tensor] = {}
    if kind in ("padded", "both"):
        given["attention_mask"] = torch.tensor([[draw.randint(0, 1) for _ in range(length)] for _ in range(rows)])
    if kind in ("packed", "both"):
        given["seq_idx"] = torch.tensor([[draw.random() < 0.2 for _ in range(length)] for _ in range(rows)]).cumsum(1)
    return plan_packing((rows, length), torch.device("cpu"), **given), rows, length


def tokens_of(packing: Packing | None, rows: int, length: int) -> dict[int, list[tuple[int, int]]]:
    """Row and column of each token, by the sequence that it belongs to."""
    if packing is None:
        return {row: [(row, column) for column in range(length)] for row in range(rows)}
    index = range(rows * length) if packing.token_index is None else packing.token_index.tolist()
    tokens: dict[int, list[tuple[int, int]]] = {n: [] for n in range(packing.rows)}
    for place, sequence in zip(index, packing.sequence_index.tolist(), strict=True):
        tokens[sequence].append(divmod(place, length))
    return tokens


def read_part(part: Part, rows: int) -> dict[int, list[tuple[int, int]]]:
    """The tokens of a part by their places in the batch, in the order in which they are read."""
    columns = max(len(part.columns), 1)
    local = tokens_of(part.packing, rows, columns)
    if part.has_ghost:
        assert local.pop(len(part.sequences)) == [(0, 0)] and not part.packing.active.any()
    begin = part.columns.start
    return {int(part.sequences[i]): [(row, begin + column) for row, column in t] for i, t in local.items()}


@pytest.mark.parametrize("kind", ["plain", "padded", "packed", "both"])
@pytest.mark.parametrize("keep_all", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_parts_cover_a_batch_and_agree_about_cuts(kind: str, keep_all: bool, seed: int):
    whole, rows, length = make_whole(kind, seed)
    ranks, part = 4, random.Random(seed).randint(1, length)
    parts = [plan_part(whole, (rows, length), part, rank, ranks, keep_all) for rank in range(ranks)]
    expected = tokens_of(whole, rows, length)
    read = [read_part(p, rows) for p in parts]
    covered = part * ranks >= length
    for sequence, tokens in expected.items():
        joined = [token for one in read for token in one.get(sequence, [])]
        assert joined == [t for t in tokens if covered or t[1] < part * ranks]
    assert parts[0].incoming is None and parts[-1].outgoing is None
    for before, after in zip(parts, parts[1:], strict=False):
        cut, column = before.outgoing, before.columns.stop
        assert cut.sequences.tolist() == after.incoming.sequences.tolist() and cut.tokens == after.incoming.tokens
        goes_on = {n: sum(c < column for _, c in t) for n, t in expected.items()}
        if not keep_all:
            goes_on = {n: count for n, count in goes_on.items() if 0 < count < len(expected[n])}
        assert dict(zip(cut.sequences.tolist(), cut.tokens, strict=True)) == goes_on
        for one in (before, after):
            assert one.sequences[one.rows_of(cut)].tolist() == cut.sequences.tolist()


def test_a_part_without_padding_needs_no_packing():
    """The rank with whole rows keeps the way of a batch without padding, and its kernels."""
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :5] = 0
    whole = plan_packing((2, 16), torch.device("cpu"), attention_mask=mask)
    first, second = (plan_part(whole, (2, 16), 8, rank, 2, False) for rank in range(2))
    assert first.packing is not None and second.packing is None
    assert second.incoming.tokens == [3, 8]


def test_columns_of_the_last_ranks_may_be_none():
    assert [part_columns(5, 2, rank) for rank in range(4)] == [range(2), range(2, 4), range(4, 5), range(5, 5)]
