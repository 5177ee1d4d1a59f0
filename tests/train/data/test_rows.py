"""Rows of tokens, the bytes they stand for, and the order in which they are read."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from modeling_tnt.train.data import RowOrder, Tokens
from modeling_tnt.train.data.tokens import Vocabulary

EOS = 1
LENGTHS = (5, 1, 9, 30, 2, 4, 1, 1, 7)  # with the end-of-sequence token
SIZES = (8, 0, 8, 87, 1, 3, 0, 0, 6)  # UTF-8 bytes


def _tokens() -> Tokens:
    draw = np.random.default_rng(0)
    documents = [np.append(draw.integers(10, 60_000, size=n - 1), EOS) for n in LENGTHS]
    starts = np.cumsum([0, *LENGTHS[:-1]])
    return Tokens(np.concatenate(documents).astype(np.uint16), starts, np.array(SIZES), Vocabulary(60_000, 60_000))


def test_joined_rows_are_the_tokens_in_order():
    tokens = _tokens()
    rows = tokens.rows(8)
    assert (tokens.num_documents, tokens.num_tokens, tokens.num_bytes, len(rows)) == (9, 60, 113, 7)
    got = torch.stack([row["input_ids"] for row in rows])
    assert got.dtype == torch.int64 and got.flatten().tolist() == tokens.tokens[:56].tolist()
    assert all(set(row) == {"input_ids", "labels"} and row["labels"].equal(row["input_ids"]) for row in rows)


@pytest.mark.parametrize("seq_len", [2, 5, 8, 60])
def test_marked_rows_against_a_loop_over_tokens(seq_len: int):
    tokens = _tokens()
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    rows = tokens.rows(seq_len, boundaries="marked")
    assert len(rows) == 60 // seq_len
    for index, row in enumerate(rows):
        here = range(index * seq_len, (index + 1) * seq_len)
        assert row["input_ids"].tolist() == [tokens.tokens[t] for t in here]
        assert row["seq_idx"].tolist() == [document[t] - document[here[0]] for t in here]
        first = [t == 0 or document[t - 1] != document[t] for t in here]
        want = [-100 if f else tokens.tokens[t] for f, t in zip(first, here, strict=True)]
        assert row["labels"].tolist() == want
        assert row["seq_idx"].dtype == row["labels"].dtype == torch.int64


@pytest.mark.parametrize("seq_len", [2, 5, 8, 60])
def test_token_bytes_are_the_average_of_the_document_and_none_at_its_end(seq_len: int):
    want = np.concatenate([[size / max(1, n - 1)] * (n - 1) + [0] for n, size in zip(LENGTHS, SIZES, strict=True)])
    rows = _tokens().rows(seq_len)
    got = torch.cat([rows.token_bytes(i) for i in range(len(rows))])
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, want[: len(got)], rtol=1e-6)


def test_the_first_rows_and_wrong_ones():
    rows = _tokens().rows(8, "marked")
    head = rows.head(3)
    assert len(head) == 3 and len(rows.head(100)) == 7 and len(head.head(5)) == 3
    assert head.boundaries == "marked" and head[2]["seq_idx"].equal(rows[2]["seq_idx"])
    for index in (3, -1):
        with pytest.raises(IndexError, match="0 to 2"):
            head[index]
    assert len(_tokens().rows(61)) == 0
    with pytest.raises(ValueError, match="seq_len=1 must be at least 2"):
        _tokens().rows(1)
    with pytest.raises(ValueError, match="boundaries='packed' must be one of"):
        _tokens().rows(8, boundaries="packed")


def test_workers_read_the_same_rows_and_files_are_not_copied_to_them(tmp_path):
    kept = _tokens()
    kept.tokens.tofile(tmp_path / "train.tokens")
    kept.starts.tofile(tmp_path / "train.starts")
    kept.document_bytes.tofile(tmp_path / "train.bytes")
    for tokens, at_most in ((kept, 2000), (Tokens.open(tmp_path, "train", kept.vocabulary), 500)):
        rows = tokens.rows(8, "marked")
        sent = pickle.dumps(rows)
        assert len(sent) < at_most and pickle.loads(sent)[6]["labels"].equal(rows[6]["labels"])
    loader = DataLoader(rows, batch_size=7, num_workers=1, multiprocessing_context="fork")
    batch = next(iter(loader))
    assert batch["input_ids"].tolist() == [row["input_ids"].tolist() for row in kept.rows(8)]


def test_an_epoch_has_every_row_once_and_blocks_are_read_in_one_go():
    order = list(RowOrder(100, seq_len=4, block_len=12, seed=3, start_tokens=0, num_rows=72))
    epochs = np.array(order).reshape(3, 8, 3)  # 8 blocks of 3 rows; the last 4 tokens are no block
    for epoch in epochs:
        assert sorted(epoch.flatten()) == list(range(24))
        assert (epoch == epoch[:, :1] + np.arange(3)).all() and (epoch[:, 0] % 3 == 0).all()
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
    assert order != list(RowOrder(100, seq_len=4, block_len=12, seed=4, start_tokens=0, num_rows=72))


def test_the_order_goes_on_from_any_position():
    whole = list(RowOrder(100, seq_len=4, block_len=12, seed=3, start_tokens=0, num_rows=60))
    for done in range(60):
        tail = RowOrder(100, seq_len=4, block_len=12, seed=3, start_tokens=4 * done, num_rows=60 - done)
        assert len(tail) == 60 - done and list(tail) == whole[done:]


def test_a_stage_with_other_rows_reads_what_the_one_before_left():
    """Two epochs of 96 tokens: rows of 4, then of 12, then of 6; every token is read exactly twice."""
    read, done = Counter(), 0
    for seq_len, num_rows in ((4, 15), (12, 5), (6, 12)):
        order = RowOrder(96, seq_len=seq_len, block_len=12, seed=0, start_tokens=done, num_rows=num_rows)
        for row in order:
            read.update(range(row * seq_len, (row + 1) * seq_len))
        done += seq_len * num_rows
    assert done == 192 and read == Counter({t: 2 for t in range(96)})


def test_sizes_that_do_not_fit():
    fitting = {"seq_len": 4, "block_len": 12, "seed": 0, "start_tokens": 0, "num_rows": 1}
    with pytest.raises(ValueError, match="seq_len=5 must divide block_len=12"):
        RowOrder(96, **fitting | {"seq_len": 5})
    with pytest.raises(ValueError, match="start_tokens=6 must be a multiple of seq_len=4"):
        RowOrder(96, **fitting | {"start_tokens": 6})
    with pytest.raises(ValueError, match="11 tokens, less than one block of block_len=12"):
        RowOrder(11, **fitting)
