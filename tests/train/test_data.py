"""Reading, splitting, packing and ordering of the training data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import ByT5Tokenizer

from modeling_tnt.train.data import Document, ShuffledRows, pack, read_corpus, split_documents

SMALL = {"data_config": None, "text_column": "text", "limit_bytes": 10**7}


def _read(*data: object, **options: object) -> list[str]:
    return [d.text for d in read_corpus([str(d) for d in data], **{**SMALL, **options}).documents]


def test_text_jsonl_parquet_and_folders_of_them(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a text\r\nof two lines", encoding="utf-8", newline="")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "zwei ü"}\n', encoding="utf-8")
    pq.write_table(pa.table({"text": ["in a table"]}), tmp_path / "c.parquet")
    (tmp_path / "picture.bin").write_bytes(b"\xff\x00")
    assert _read(tmp_path / "b.jsonl") == ["one", "zwei ü"]
    assert _read(tmp_path / "c.parquet", tmp_path / "a.txt") == ["in a table", "a text\r\nof two lines"]
    assert len(_read(tmp_path)) == 4


def test_another_text_column(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "here", "id": 3}) + "\n")
    assert _read(tmp_path / "a.jsonl", text_column="body") == ["here"]
    with pytest.raises(ValueError, match=r"text_column='text' is no column of .*\['body', 'id'\]"):
        _read(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="holds int, not text"):
        _read(tmp_path / "a.jsonl", text_column="id")


def test_a_dataset_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A name goes to `datasets.load_dataset`; here to a dataset in a folder, as there is no network."""
    import datasets

    pq.write_table(pa.table({"text": ["row one", "row two"]}), tmp_path / "train-00000.parquet")
    asked = []

    def load(name: str, config: str | None, **options: object):
        asked.append((name, config))
        return real(str(tmp_path), **options)

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert _read("owner/name", data_config="english") == ["row one", "row two"]
    assert asked == [("owner/name", "english")]


def test_an_unreachable_dataset_is_an_oserror(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def load(*_: object, **__: object):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(OSError, match="'nosuch' is no file or folder here, and `datasets` could not load it"):
        _read("nosuch")


def test_unreadable_data(tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text("{nope\n")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no text"):
        _read(tmp_path / "empty.txt", tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="latin.txt' is not UTF-8"):
        _read(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match="bad.jsonl' cannot be read as json"):
        _read(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="folder without files of a known kind"):
        _read(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="missing.txt' does not exist"):
        _read(tmp_path / "missing.txt")


def test_the_limit_stops_reading_and_is_told(tmp_path: Path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("x" * 100 + str(i))
    corpus = read_corpus([str(tmp_path)], **{**SMALL, "limit_bytes": 150})
    assert len(corpus.documents) == 2 and "--data-limit" in corpus.description


def test_the_standard_library_is_split_the_same_way_each_time():
    first, second = (split_documents(read_corpus([], **SMALL).documents, 0.05) for _ in range(2))
    assert first == second
    assert not {d.key for d in first.train} & {d.key for d in first.validation}
    sizes = [sum(len(d.text.encode()) for d in side) for side in first]
    # Documents are taken while they fit, so the share is met but for less than the smallest document.
    assert sizes[1] / sum(sizes) == pytest.approx(0.05, abs=0.001)
    assert sizes[0] > 4e6


def test_the_split_does_not_depend_on_the_order_and_keeps_equal_texts_together():
    documents = [Document(text, text) for text in (f"text {i % 30:02}" for i in range(60))]
    split, reversed_split = split_documents(documents, 0.2), split_documents(documents[::-1], 0.2)
    assert split == reversed_split
    assert len(split.validation) == 12 and not set(split.train) & set(split.validation)


def test_small_numbers_of_documents():
    one = split_documents([Document("k", "abcdefghij")], 0.2)
    assert one.train[0].text == "abcdefgh" and one.validation[0].text == "ij"
    two = split_documents([Document("a", "a" * 90), Document("b", "b" * 110)], 0.1)
    assert [d.key for d in two.train] == ["b"] and [d.key for d in two.validation] == ["a"]
    with pytest.raises(ValueError, match="all documents of the data are equal"):
        split_documents([Document("a", "a")] * 3, 0.5)


def test_packing_loses_no_byte_and_does_not_read_special_tokens_in_text():
    texts = ["héllo </s>\r\n <extra_id_3> \0", "b"]
    packed = pack([Document(t, t) for t in texts], ByT5Tokenizer())
    # Tokens are bytes + 3, so the end-of-sequence token, 1, becomes byte -2.
    want = b"".join(t.encode() + b"\xfe" for t in texts)
    assert bytes((int(t) - 3) % 256 for t in packed.tokens) == want
    assert packed.token_bytes.sum() == sum(len(t.encode()) for t in texts)
    assert packed.token_bytes[packed.tokens == 1].sum() == 0
    assert packed.rows(8).tokens.shape == (len(want) // 8, 8)


def test_the_order_of_rows_goes_on_where_it_stopped_and_each_epoch_has_every_row():
    whole = list(ShuffledRows(7, seed=3, start=0, count=21))
    cut = [*ShuffledRows(7, seed=3, start=0, count=10), *ShuffledRows(7, seed=3, start=10, count=11)]
    assert whole == cut
    epochs = np.array(whole).reshape(3, 7)
    assert (np.sort(epochs) == np.arange(7)).all()
    assert (epochs[0] != epochs[1]).any()
    assert whole != list(ShuffledRows(7, seed=4, start=0, count=21))
