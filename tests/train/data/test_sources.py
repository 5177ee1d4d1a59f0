"""Which documents come from files, folders, saved datasets and the Hub, and what is said about those that cannot."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sysconfig
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_tnt.train.data import DataOptions
from modeling_tnt.train.data import sources as sources_module
from modeling_tnt.train.data.sources import find_source


def _read(*sources: object, **options: object) -> list[str]:
    source = find_source(DataOptions(sources=[str(s) for s in sources], **options))
    return [document.text for document in source.read()]


def _write_arrow(path: Path, table: pa.Table, opener: object) -> None:
    with opener(str(path), table.schema) as writer:
        writer.write_table(table)


def test_text_jsonl_parquet_arrow_and_folders_of_them(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a text\r\nof two lines", encoding="utf-8", newline="")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "zwei ü"}\n', encoding="utf-8")
    pq.write_table(pa.table({"text": ["in a table"]}), tmp_path / "c.parquet")
    _write_arrow(tmp_path / "d.arrow", pa.table({"text": ["streamed"]}), pa.ipc.new_stream)
    _write_arrow(tmp_path / "e.arrow", pa.table({"text": ["at random"]}), pa.ipc.new_file)
    (tmp_path / "picture.bin").write_bytes(b"\xff\x00")
    assert _read(tmp_path / "b.jsonl") == ["one", "zwei ü"]
    assert _read(tmp_path / "c.parquet", tmp_path / "a.txt") == ["in a table", "a text\r\nof two lines"]
    assert _read(tmp_path) == ["a text\r\nof two lines", "one", "zwei ü", "in a table", "streamed", "at random"]


PACKED = {
    ".gz": gzip.compress, ".BZ2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True),
}  # fmt: skip
CSV = 'id,text\r\n007,"one, two\r\nthree"\r\n8,NA\r\n9,""\r\n10,012\n'


@pytest.mark.parametrize("suffix", ["", *PACKED])
def test_compressed_files_and_suffixes_of_any_case(tmp_path: Path, suffix: str):
    contents = {
        "a.CSV": (CSV, ["one, two\r\nthree", "NA", "", "012"]),
        "b.tsv": ('text\tn\n"a, b"\t3\n', ["a, b"]),
        "c.JSONL": ('{"text": "zwei ü"}\n', ["zwei ü"]),
        "d.json": ('[{"text": "in a list"}]', ["in a list"]),
        "e [1]*.Txt": ("as it\r\nis", ["as it\r\nis"]),
        "f.jsonl": ("", []),
    }
    for name, (content, _) in contents.items():
        raw = content.encode()
        (tmp_path / (name + suffix)).write_bytes(PACKED[suffix](raw) if suffix else raw)
    for name, (_, texts) in contents.items():
        assert _read(tmp_path / (name + suffix)) == texts, name
    assert _read(tmp_path) == [text for _, texts in contents.values() for text in texts]


def test_what_a_folder_holds_besides_text_is_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A linked folder is followed once, and a loop ends."""
    folder, other = tmp_path / "texts", tmp_path / "other"
    (folder / "closed").mkdir(parents=True)
    other.mkdir()
    for path in (folder / "a.txt", folder / "b.bin", folder / "c.bin", folder / "LICENSE", other / "z.txt"):
        path.write_text(path.name)
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "loop").symlink_to(folder)
    for name in ("other", "other again"):
        (folder / name).symlink_to(other)
    real = os.scandir

    def scan(path: str):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert _read(folder) == ["a.txt", "z.txt"]
    skipped = find_source(DataOptions(sources=[str(folder)])).skipped
    assert skipped.startswith("not read: 2 .bin, 1 without a suffix, 1 unreadable folder, 1 broken link (")
    assert skipped.endswith(f"({folder / 'LICENSE'}, {folder / 'b.bin'}, {folder / 'c.bin'}, ...)")
    assert find_source(DataOptions(sources=[str(other)])).skipped == ""


def test_a_file_that_was_named_is_read_or_refused(tmp_path: Path):
    for name in ("enwik8", "a.log", "b.log.gz"):
        (tmp_path / name).write_text("text")
    assert _read(tmp_path / "enwik8") == ["text"]
    with pytest.raises(ValueError, match=r"a.log' has the suffix .log, .* rename it to a.log.txt \(known are .txt"):
        _read(tmp_path / "a.log")
    with pytest.raises(ValueError, match="has the suffix .log,"):
        _read(tmp_path / "b.log.gz")
    with pytest.raises(ValueError, match=r"folder without files of a known kind .*; not read: 2 .log "):
        (tmp_path / "enwik8").unlink()
        _read(tmp_path)


def test_damaged_compressed_files_are_named(tmp_path: Path):
    for name in ("a.txt.gz", "b.csv.gz", "c.jsonl.zst"):
        packed = PACKED[Path(name).suffix](os.urandom(5000))
        (tmp_path / name).write_bytes(packed[:300])
        with pytest.raises((OSError, ValueError), match=f"{name}' cannot be read as"):
            _read(tmp_path / name)


def test_encodings(tmp_path: Path):
    latin = {"a.txt": "für", "b.jsonl": '{"text": "für"}\n', "c.csv": "text\nfür\n"}
    for name, content in latin.items():
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=f"{name}' .*--data.encoding cp1252, .*--data.encoding-errors replace"):
            _read(tmp_path / name)
        assert _read(tmp_path / name, encoding="latin-1") == ["für"]
        assert _read(tmp_path / name, encoding_errors="replace") == ["f\N{REPLACEMENT CHARACTER}r"]
        assert _read(tmp_path / name, encoding_errors="ignore") == ["fr"]
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "d.parquet")
    for given in ([tmp_path / "d.parquet"], [], ["owner/name"]):
        with pytest.raises(ValueError, match="--data.encoding latin-1 is for text, JSON and CSV files, of which"):
            _read(*given, encoding="latin-1")


def test_the_other_files_that_cannot_be_decoded_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_bytes("für".encode("utf-8" if i in (0, 3) else "latin-1"))
    with pytest.raises(ValueError, match=r"1.txt' is not UTF-8 text .*, nor are '.*2.txt', '.*4.txt', '.*5.txt'; give"):
        _read(tmp_path)
    monkeypatch.setattr(sources_module, "NAMED_BAD", 2)
    with pytest.raises(ValueError, match=r"nor are '.*2.txt', '.*4.txt', perhaps more; give"):
        _read(tmp_path)
    monkeypatch.setattr(sources_module, "SCANNED_BYTES", 4)
    with pytest.raises(ValueError, match=r"nor are '.*2.txt', perhaps more; give"):
        _read(tmp_path)


def test_a_name_with_the_signs_of_patterns(tmp_path: Path):
    (tmp_path / "part [1]*.jsonl").write_text('{"text": "one"}\n')
    assert _read(tmp_path / "part [1]*.jsonl") == ["one"]


def test_a_folder_written_by_save_to_disk(tmp_path: Path):
    dataset = datasets.Dataset.from_dict({"body": ["one", "two"], "id": [1, 2]})
    dataset.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=dataset, extra=dataset.select([1])).save_to_disk(tmp_path / "many")
    assert _read(tmp_path / "single", text_column="body") == ["one", "two"]
    assert _read(tmp_path / "many", text_column="body", split="extra") == ["two"]
    with pytest.raises(ValueError, match=r"--data.split test is no split of .*\['extra', 'train'\]"):
        _read(tmp_path / "many", text_column="body", split="test")
    with pytest.raises(ValueError, match="one dataset without splits"):
        _read(tmp_path / "single", text_column="body", split="test")
    with pytest.raises(ValueError, match=r"--data.text-column text is no column of .*\['body', 'id'\]"):
        _read(tmp_path / "single")


def test_another_text_column(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "here", "id": 3}) + "\n")
    assert _read(tmp_path / "a.jsonl", text_column="body") == ["here"]
    with pytest.raises(ValueError, match=r"--data.text-column text is no column of .*\['body', 'id'\]"):
        _read(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="holds int, not text"):
        _read(tmp_path / "a.jsonl", text_column="id")


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A name goes to `datasets.load_dataset`; here to a dataset in a folder, as there is no network."""
    pq.write_table(pa.table({"text": ["row one", "row two"]}), tmp_path / "valid-00000.parquet")
    asked = []

    def load(name: str, config: str | None, **options: object):
        asked.append((name, config, options))
        return real(str(tmp_path), **options)

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sources_module, "find_hub_revision", lambda name: "abc")
    assert _read("owner/name", config="english", split="validation") == ["row one", "row two"]
    assert asked == [("owner/name", "english", {"split": "validation", "revision": "abc", "streaming": True})]


def test_an_unreachable_dataset_is_an_oserror(monkeypatch: pytest.MonkeyPatch):
    def load(*_: object, **__: object):
        raise RuntimeError("no route")  # the HTTP clients' errors are no OSErrors

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sources_module, "find_hub_revision", lambda name: None)
    with pytest.raises(OSError, match="'nosuch' is no file or folder here, and `datasets` could not read it.*no route"):
        _read("nosuch")


def test_unreadable_data(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text("{nope\n")
    (tmp_path / "bad.parquet").write_text("nope")
    (tmp_path / "bad.arrow").write_text("nope")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="latin.txt' is not UTF-8"):
        _read(tmp_path / "latin.txt")
    for suffix, kind in (("jsonl", "json"), ("parquet", "parquet"), ("arrow", "arrow")):
        with pytest.raises(ValueError, match=f"bad.{suffix}' cannot be read as {kind}"):
            _read(tmp_path / f"bad.{suffix}")
    with pytest.raises(ValueError, match="folder without files of a known kind"):
        _read(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="missing.txt' does not exist"):
        _read(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError, match="'owner/name' does not exist; give files, folders, or one dataset"):
        _read(tmp_path / "latin.txt", "owner/name")


def test_options_of_the_hub_are_refused_for_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="--data.config english is for a dataset of the Hub"):
        _read(tmp_path / "a.txt", config="english")
    with pytest.raises(ValueError, match="--data.split test .* files have no splits"):
        _read(tmp_path / "a.txt", split="test")
    with pytest.raises(ValueError, match="files have no splits"):
        _read(split="test")


def test_the_standard_library_is_read_by_default():
    source = find_source(DataOptions())
    documents = list(islice(source.read(), 20))
    assert [d.key for d in documents[:2]] == ["__future__.py", "__hello__.py"]
    assert documents[0].text == Path(sysconfig.get_paths()["stdlib"], "__future__.py").read_text(encoding="utf-8")


def test_the_version_changes_with_the_files(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("text")
    options = DataOptions(sources=[str(file)])
    first = find_source(options)
    assert find_source(options).revision == first.revision and first.num_bytes == 4
    file.write_text("longer text")
    assert find_source(options).revision != first.revision
