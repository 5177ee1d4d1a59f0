"""Tokenised once: what is found again, what is not, and what killed, failing and simultaneous processes leave."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_tnt.train.data import DataOptions, TokenizedData, cache, encode, load_data, load_tokenizer, split, store
from modeling_tnt.train.data import sources as sources_module
from modeling_tnt.train.data.encode import PROBE, Encoder
from modeling_tnt.train.data.store import CorpusWriter

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """300 documents of 60 bytes."""
    draw = random.Random(0)
    path = tmp_path / "text.jsonl"
    texts = ("".join(draw.choices("abcdefgh ", k=60)) for _ in range(300))
    path.write_text("".join(json.dumps({"text": text, "other": text[::-1]}) + "\n" for text in texts))
    return path


@pytest.fixture
def options(jsonl: Path, tmp_path: Path) -> DataOptions:
    return DataOptions(sources=[str(jsonl)], cache_dir=tmp_path / "cache", validation_share=0.2)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten documents a batch."""
    monkeypatch.setattr(split, "BATCH_DOCUMENTS", 10)


def _texts(data: TokenizedData) -> list[list[str]]:
    """The documents of both sides, decoded from ByT5's tokens."""
    sides = []
    for tokens in (data.train, data.validation):
        documents = np.split(tokens.tokens, tokens.starts[1:])
        assert all(d[-1] == 1 for d in documents)
        sides.append([(d[:-1] - 3).astype(np.uint8).tobytes().decode() for d in documents])
        assert [len(text.encode()) for text in sides[-1]] == tokens.document_bytes.tolist()
    return sides


def _entries(options: DataOptions) -> list[str]:
    """What the cache holds but for locks."""
    folder = options.find_cache_dir()
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock") if folder.exists() else []


def _fast_tokenizer(texts: list[str], vocab_size: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


# -------------------------------------------------------------------------------------------------------- what is held


def test_every_text_is_held_once_and_the_second_time_nothing_is_read(
    options: DataOptions, jsonl: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    first = load_data(options, ByT5Tokenizer())
    texts = _texts(first)
    assert sorted(texts[0] + texts[1]) == sorted(json.loads(line)["text"] for line in jsonl.open())
    assert 30 <= len(texts[1]) <= 90 and not set(texts[0]) & set(texts[1])
    assert first.train.num_bytes + first.validation.num_bytes == 300 * 60
    assert sorted(p.name for p in (options.cache_dir / _entries(options)[0]).iterdir()) == [
        "manifest.json", "train.bytes", "train.starts", "train.tokens",
        "validation.bytes", "validation.starts", "validation.tokens",
    ]  # fmt: skip
    capfd.readouterr()
    monkeypatch.setattr(cache, "_tokenise", None)
    again = load_data(options, ByT5Tokenizer())
    assert _texts(again) == texts and again.description == first.description == str(jsonl)
    assert capfd.readouterr() == ("", "")


def test_what_is_not_read_is_told_each_time(options: DataOptions, jsonl: Path):
    (jsonl.parent / "texts").mkdir()
    folder = jsonl.rename(jsonl.parent / "texts" / jsonl.name).parent
    options.sources = [str(folder)]
    assert load_data(options, ByT5Tokenizer()).description == str(folder)
    (folder / "later.bin").touch()
    told = f"{folder}; not read: 1 .bin ({folder / 'later.bin'})"
    assert load_data(options, ByT5Tokenizer()).description == told


def test_the_held_out_documents_are_shuffled(options: DataOptions, jsonl: Path):
    """The first few rows stand for all of them only if they are no particular part of the corpus."""
    train, held_out = _texts(load_data(options, ByT5Tokenizer()))
    order = [json.loads(line)["text"] for line in jsonl.open()]
    assert train == [text for text in order if text in set(train)]
    assert held_out != sorted(held_out, key=order.index)


def test_what_matters_is_tokenised_anew(options: DataOptions, jsonl: Path, tmp_path: Path):
    load_data(options, ByT5Tokenizer())
    seen = len(_entries(options))
    tokenizers = [_fast_tokenizer([jsonl.read_text()]), _fast_tokenizer([jsonl.read_text()[::-1]])]
    changes = [{"text_column": "other"}, {"limit_megabytes": 0.001}, {"validation_share": 0.3}]
    changes += [{"encoding": "latin-1"}, {"encoding_errors": "ignore"}]
    asked = [(DataOptions(**vars(options) | change), ByT5Tokenizer()) for change in changes]
    for given, tokenizer in asked + [(options, tokenizer) for tokenizer in tokenizers]:
        load_data(given, tokenizer)
        seen += 1
        assert len(_entries(options)) == seen
    tokenizers[0].save_pretrained(tmp_path / "renamed")
    load_data(options, load_tokenizer(str(tmp_path / "renamed")))  # the same tokenizer from a folder
    load_data(DataOptions(**vars(options) | {"boundaries": "marked"}), ByT5Tokenizer())  # only read in another way
    assert len(_entries(options)) == seen
    with jsonl.open("a") as file:
        file.write('{"text": "new"}\n')
    load_data(options, ByT5Tokenizer())
    assert len(_entries(options)) == seen + 1


def test_the_limit_is_kept_to_the_byte_and_told(options: DataOptions):
    options.limit_megabytes = 0.001
    data = load_data(options, ByT5Tokenizer())
    assert data.train.num_bytes + data.validation.num_bytes == 1000
    assert "the first 0.0 MB; --data.limit-megabytes reads more" in data.description
    options.limit_megabytes = 0
    assert load_data(options, ByT5Tokenizer()).train.num_documents > 200


def test_a_character_at_the_limit_is_not_cut(tmp_path: Path):
    (tmp_path / "a.txt").write_text("ü" * 1000, encoding="utf-8")
    given = DataOptions(sources=[str(tmp_path / "a.txt")], limit_megabytes=0.000101, cache_dir=tmp_path / "cache")
    train, held_out = _texts(load_data(given, ByT5Tokenizer()))
    assert train + held_out == ["ü" * 47, "ü" * 3]


# ---------------------------------------------------------------------------------------------------------- tokenizers


def test_bytes_are_what_byt5_makes_of_them():
    texts = ["héllo </s>\r\n <extra_id_3> <pad>\0", "", "b", PROBE]
    tokenizer = ByT5Tokenizer()
    want = [tokenizer(t, add_special_tokens=False, split_special_tokens=True).input_ids + [1] for t in texts]
    assert [ids.tolist() for ids in Encoder(tokenizer)(texts)] == want
    tokenizer.add_tokens(["llo"])  # not split at either
    assert tokenizer(texts[0], add_special_tokens=False, split_special_tokens=True).input_ids + [1] == want[0]


def test_a_fast_tokenizer_and_special_tokens_spelled_in_the_text(tmp_path: Path):
    texts = ["some text </s> and more", "other text", "ü" * 5]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenizer = _fast_tokenizer(texts)
    data = load_data(DataOptions(sources=[str(tmp_path / "a.jsonl")], cache_dir=tmp_path / "cache"), tokenizer)
    decoded = []
    for tokens in (data.train, data.validation):
        assert (tokens.tokens == tokenizer.eos_token_id).sum() == tokens.num_documents
        decoded += [tokenizer.decode(d[:-1]) for d in np.split(tokens.tokens, tokens.starts[1:])]
        row = tokens.rows(tokens.num_tokens).token_bytes(0)
        assert row.sum().item() == pytest.approx(tokens.num_bytes, rel=1e-6)
    assert sorted(decoded) == sorted(texts)


def test_a_long_document_is_told_of(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    monkeypatch.setattr(encode, "LONG", 20)
    encoder = Encoder(_fast_tokenizer(["text"]))
    encoder(["text" * 4, ""])
    assert capfd.readouterr().err == ""
    encoder(["text" * 5])
    assert "million characters is tokenised in one piece, by one thread" in capfd.readouterr().err


def test_large_vocabularies_take_four_bytes_a_token():
    class Wide(ByT5Tokenizer):
        def get_vocab(self) -> dict[str, int]:
            return super().get_vocab() | {"far": 70_000}

    assert Encoder(ByT5Tokenizer()).vocabulary == (384, 257) and Encoder(ByT5Tokenizer())(["a"])[0].dtype == np.uint16
    assert Encoder(Wide())(["a"])[0].dtype == np.uint32


def test_the_end_of_sequence_is_needed(options: DataOptions):
    tokenizer = _fast_tokenizer(["text"])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-sequence token, which separates documents"):
        load_data(options, tokenizer)
    with pytest.raises(OSError, match="--data.tokenizer ./nothing could not be loaded"):
        load_tokenizer("./nothing")


# ------------------------------------------------------------------------------------------------------------ bad input


def test_every_broken_rule_is_told_at_once(tmp_path: Path):
    (tmp_path / "file").touch()
    wrong = DataOptions(
        limit_megabytes=-1, validation_share=1, boundaries="packed", text_column="", cache_dir=tmp_path / "file" / "x",
        encoding="rot13", encoding_errors="xmlcharrefreplace",
    )  # fmt: skip
    flags = ["limit-megabytes", "validation-share", "boundaries", "encoding-errors", "encoding", "text-column"]
    flags.append("cache-dir")
    assert [p.split()[0] for p in wrong.problems()] == [f"--data.{flag}" for flag in flags]
    with pytest.raises(ValueError, match=r"(?s)limit-megabytes.*cache-dir .*/file is a file"):
        load_data(wrong, ByT5Tokenizer())
    with pytest.raises(TypeError, match=r"data.sources must be a list, got str; use \['a.txt'\]"):
        DataOptions(sources="a.txt")


def test_data_without_text_leaves_nothing(tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    given = DataOptions(sources=[str(tmp_path)], cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="holds no text; point --data.sources at files that do"):
        load_data(given, ByT5Tokenizer())
    assert _entries(given) == []


def test_a_side_without_documents(options: DataOptions, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(split, "WAITING_DOCUMENTS", 100)
    options.validation_share = 1e-9
    with pytest.raises(ValueError, match="no document of .* is on the validation side; give another --data.validation"):
        load_data(options, ByT5Tokenizer())
    assert _entries(options) == []


def test_bad_data_after_good_data_leaves_nothing(options: DataOptions, jsonl: Path, small_batches: None):
    (jsonl.parent / "zz.txt").write_bytes("für".encode("latin-1"))
    options.sources.append(str(jsonl.parent / "zz.txt"))
    with pytest.raises(ValueError, match="zz.txt' is not UTF-8 text"):
        load_data(options, ByT5Tokenizer())
    assert _entries(options) == []


def test_a_write_that_fails_says_what_to_do_and_leaves_nothing(options: DataOptions, small_batches: None):
    """A real failure of the system: files may not grow beyond 4096 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large while tokenised data was written to .*--data.cache-dir"):
            load_data(options, ByT5Tokenizer())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _entries(options) == []
    assert load_data(options, ByT5Tokenizer()).train.num_documents > 200


def test_a_cache_that_cannot_be_made(options: DataOptions):
    options.cache_dir = Path("/proc/tnt")  # where not even root can make a folder
    with pytest.raises(OSError, match="in /proc/tnt; give a folder that can be written with --data.cache-dir"):
        load_data(options, ByT5Tokenizer())


@pytest.mark.parametrize("block", [store.BLOCK, 64])
def test_a_damaged_corpus_is_made_again(
    options: DataOptions, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, block: int
):
    monkeypatch.setattr(store, "BLOCK", block)
    texts = _texts(load_data(options, ByT5Tokenizer()))
    folder = options.cache_dir / _entries(options)[0]
    os.truncate(folder / "train.tokens", 100)
    assert _texts(load_data(options, ByT5Tokenizer())) == texts
    for manifest in ("{", "[]", "{}"):
        (folder / "manifest.json").write_text(manifest)
        assert _texts(load_data(options, ByT5Tokenizer())) == texts
    assert capfd.readouterr().err == ""
    for name in ("train.tokens", "train.starts", "validation.tokens", "validation.bytes"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        assert _texts(load_data(options, ByT5Tokenizer())) == texts
        assert capfd.readouterr().err == f"{folder / name} of the tokenised data is damaged; it is made again\n"


def test_of_a_large_corpus_a_part_is_verified(options: DataOptions, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "BLOCK", 64)
    monkeypatch.setattr(store, "VERIFIED", 640)
    load_data(options, ByT5Tokenizer())
    computed, real = [], store.zlib.crc32
    monkeypatch.setattr(store.zlib, "crc32", lambda data: computed.append(len(data)) or real(data))
    load_data(options, ByT5Tokenizer())
    assert len(computed) == 10 and max(computed) <= 64


# ----------------------------------------------------------------------------------------------------------- processes


def _run(target: Callable[..., None], *args: object) -> int:
    process = FORK.Process(target=target, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def _load_and_die(options: DataOptions, of: type, method: str, at: int, after: bool) -> None:
    """Kill this process at the `at`-th call of a method, before or after it does its work."""
    real, calls = getattr(of, method), 0

    def count(self: object, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(self, *args)
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(of, method, count)
    load_data(options, ByT5Tokenizer())


@pytest.mark.parametrize(
    "killed",
    [
        (CorpusWriter, "append", 2, False),
        (CorpusWriter, "append", 21, True),
        (CorpusWriter, "_shuffle_validation", 1, True),
        (Path, "rename", 1, False),
    ],
    ids=lambda killed: f"{killed[1]} {killed[2]}",
)
def test_what_a_killed_tokenisation_left_is_not_taken_for_the_whole(
    options: DataOptions, tmp_path: Path, small_batches: None, killed: tuple
):
    whole = load_data(DataOptions(**vars(options) | {"cache_dir": tmp_path / "other"}), ByT5Tokenizer())
    assert _run(_load_and_die, options, *killed) == -signal.SIGKILL
    (left,) = _entries(options)
    assert left.endswith(".partial")
    (options.cache_dir / left / "of an earlier version").touch()
    assert _texts(load_data(options, ByT5Tokenizer())) == _texts(whole)
    assert _entries(options) == [left.removesuffix(".partial")]
    assert len(list((options.cache_dir / _entries(options)[0]).iterdir())) == 7


def _load_slowly(options: DataOptions, started: object, codes: object) -> None:
    real = CorpusWriter.append

    def slow(self: CorpusWriter, *args: object) -> None:
        time.sleep(0.01)
        real(self, *args)

    CorpusWriter.append = slow
    started.wait()
    codes.put(load_data(options, ByT5Tokenizer()).train.num_documents)


def test_processes_that_ask_at_once_all_get_it(options: DataOptions, small_batches: None):
    started, codes = FORK.Barrier(3), FORK.Queue()
    processes = [FORK.Process(target=_load_slowly, args=(options, started, codes)) for _ in range(3)]
    for process in processes:
        process.start()
    counts = {codes.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert counts == {load_data(options, ByT5Tokenizer()).train.num_documents}
    assert len(_entries(options)) == 1


# -------------------------------------------------------------------------------------------------------------- the Hub


class Hub:
    """Stands for the Hub: one dataset of two files, its version, and the connection, which may break."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.revision: str | None = "abc"
        self.breaks_at: int | None = None
        self.records = 0
        for part in range(2):
            table = pa.table({"text": [f"document {part} {i} " * 4 for i in range(100)]})
            pq.write_table(table, folder / f"train-{part}.parquet", row_group_size=10)
        real = datasets.load_dataset

        def load(name: str, config: str | None, **options: object) -> datasets.IterableDataset:
            return real(str(folder), **options).map(self._count)

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(sources_module, "find_hub_revision", lambda name: self.revision)

    def _count(self, record: dict) -> dict:
        self.records += 1
        if self.records == self.breaks_at:
            raise RuntimeError("connection lost")
        return record


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "hub").mkdir()
    return Hub(tmp_path / "hub", monkeypatch)


def _load_hub(tmp_path: Path, cache_name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> TokenizedData:
    given = DataOptions(sources=["owner/name"], cache_dir=tmp_path / cache_name, validation_share=0.2)
    return load_data(given, tokenizer or ByT5Tokenizer())


def test_a_lost_connection_leaves_nothing_and_the_data_is_read_anew(tmp_path: Path, hub: Hub, small_batches: None):
    whole = _load_hub(tmp_path, "other")
    assert hub.records == 200
    hub.records, hub.breaks_at = 0, 150
    with pytest.raises(OSError, match="connection lost"):
        _load_hub(tmp_path, "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    hub.records, hub.breaks_at = 0, None
    assert _texts(_load_hub(tmp_path, "cache")) == _texts(whole)
    assert hub.records == 200


def test_a_dataset_of_another_version_is_read_anew_and_offline_the_last_one_is_found(tmp_path: Path, hub: Hub):
    _load_hub(tmp_path, "cache")
    hub.revision = "def"
    _load_hub(tmp_path, "cache")
    assert hub.records == 400
    hub.revision = None
    assert "the Hub cannot be asked for its version" in _load_hub(tmp_path, "cache").description
    assert hub.records == 400
    _load_hub(tmp_path, "new")
    assert hub.records == 600
