"""Where documents come from: files, folders, saved datasets, the Hub. Everything is read as a stream."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..options import flag_of
from .files import (
    COMPRESSIONS,
    KNOWN_SUFFIXES,
    Found,
    describe_skipped,
    find_files,
    find_format,
    prepare_zstd,
    read_file,
    reader_options,
)
from .options import DataOptions

NAMED_BAD, SCANNED_BYTES = 10, 256 << 20  # files that cannot be decoded: how many are named, how much is looked at
STDLIB_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document(NamedTuple):
    """One text and the key that decides its side of the split: documents with equal keys are never separated."""

    key: str
    text: str


class ColumnError(ValueError):
    """The text column is missing or holds no text."""


# --------------------------------------------------------------------------------------------------- parts of a source


@dataclass
class TextFile:
    """A text file, which is one document. `key`: of the split; None: the text."""

    path: Path
    key: str | None
    encoding: str
    errors: str
    skip_undecodable: bool = False

    def read(self) -> Iterator[Document]:
        try:
            text = self.decode()
        except UnicodeDecodeError:
            if self.skip_undecodable:
                return
            raise
        yield Document(self.key or text, text)

    def decode(self) -> str:
        return read_file(self.path, find_format(self.path).compression).decode(self.encoding, self.errors)


@dataclass
class TableFile:
    """A JSON, CSV, parquet or arrow file; every record is a document."""

    path: Path
    text_column: str
    encoding: str
    errors: str

    def read(self) -> Iterator[Document]:
        from datasets import load_dataset  # imported here: the default job does not need it and it takes a second

        if self.path.stat().st_size == 0:
            return
        kind = find_format(self.path).kind
        options = reader_options(self.path, self.text_column, self.encoding, self.errors)
        try:
            prepare_zstd()
            # Streaming reads the file itself; without it `datasets` would write a copy to its cache.
            name = glob.escape(str(self.path))  # `datasets` takes file names for patterns
            records = load_dataset(kind, data_files=[name], split="train", streaming=True, **options)
            yield from _to_documents(records, self.text_column, str(self.path))
        except ColumnError:
            raise
        except StopIteration:  # of `datasets`, for an empty compressed file
            return
        except Exception as error:  # those of decompression are no OSErrors
            undecodable = options and (isinstance(error, UnicodeDecodeError) or "UTF8" in str(error))
            remedy = f"; {_ENCODINGS}" if undecodable else ""
            raise ValueError(f"data.sources: {str(self.path)!r} cannot be read as {kind}: {error}{remedy}") from error


_ENCODINGS = (
    "give its encoding, e.g. --data.encoding cp1252, or say what is done with bad bytes, e.g. --data.encoding-errors "
    "replace"
)


@dataclass
class SavedDataset:
    """A split of a folder written by save_to_disk, already opened."""

    path: Path
    text_column: str
    records: Any

    def read(self) -> Iterator[Document]:
        _check_column(self.text_column, self.records.column_names, str(self.path))
        yield from _to_documents(self.records.select_columns([self.text_column]), self.text_column, str(self.path))


@dataclass
class HubDataset:
    """A split of a dataset of the Hub, which is streamed. `revision`: commit to read; None: the newest."""

    name: str
    config: str | None
    split: str
    text_column: str
    revision: str | None

    def read(self) -> Iterator[Document]:
        from datasets import load_dataset

        try:
            records = load_dataset(self.name, self.config, split=self.split, revision=self.revision, streaming=True)
            yield from _to_documents(records, self.text_column, self.name)
        except ColumnError:
            raise
        except Exception as error:  # those of HTTP clients are neither OSError nor the same in all versions
            raise OSError(
                f"data.sources: {self.name!r} is no file or folder here, and `datasets` could not read it as a "
                f"dataset: {error}"
            ) from error


Part = TextFile | TableFile | SavedDataset | HubDataset


def _to_documents(records: Any, text_column: str, name: str) -> Iterator[Document]:
    for record in records:
        _check_column(text_column, record, name)
        text = record[text_column]
        if not isinstance(text, str):
            raise ColumnError(f"--data.text-column {text_column} of {name} holds {type(text).__name__}, not text")
        yield Document(text, text)


def _check_column(text_column: str, columns: Any, name: str) -> None:
    if text_column not in columns:
        raise ColumnError(f"--data.text-column {text_column} is no column of {name}; use one of {sorted(columns)}")


# -------------------------------------------------------------------------------------------------------- whole source


@dataclass
class Source:
    """What the options name, found but not yet read.

    Args:
        description: in words.
        names: what was asked for, as JSON; with `revision` it says which text will come.
        revision: hash or name of the content's version; None when the Hub cannot be asked.
        parts: in order.
        num_bytes: size of the text, where it is known without reading.
        skipped: what of the named folders is not read, in words.
    """

    description: str
    names: list[Any]
    revision: str | None
    parts: list[Part]
    num_bytes: int | None = None
    skipped: str = ""

    def read(self) -> Iterator[Document]:
        for index, part in enumerate(self.parts):
            try:
                yield from part.read()
            except UnicodeDecodeError as error:
                if not isinstance(part, TextFile):
                    raise
                raise ValueError(_explain_undecodable(part, error, self.parts[index + 1 :])) from error


def _explain_undecodable(part: TextFile, error: UnicodeDecodeError, later: list[Part]) -> str:
    """Also names other text files that cannot be decoded, of the first `SCANNED_BYTES` that follow."""
    others, left = [], SCANNED_BYTES
    for other in (other for other in later if isinstance(other, TextFile)):
        left -= other.path.stat().st_size
        if left < 0 or len(others) == NAMED_BAD:
            others.append("perhaps more")
            break
        with suppress(OSError):
            try:
                other.decode()
            except UnicodeDecodeError:
                others.append(repr(str(other.path)))
    also = f", nor are {', '.join(others)}" if others else ""
    return f"data.sources: {str(part.path)!r} is not {part.encoding.upper()} text ({error}){also}; {_ENCODINGS}"


def find_source(options: DataOptions) -> Source:
    """Find what `options.sources` names.

    Raises:
        OSError: for a file that does not exist or cannot be read.
        ValueError: for a folder without files of a known kind, or options that the source does not have.
    """
    sources = options.sources
    if not sources:
        return _stdlib_source(options)
    if is_on_hub(sources):
        _refuse_encoding(options)
        revision = find_hub_revision(sources[0])
        part = HubDataset(sources[0], options.config, options.split, options.text_column, revision)
        names = ["hub", sources[0], options.config, options.split]
        return Source(f"the dataset {sources[0]}, {options.split}", names, revision, [part])
    paths = [Path(name).expanduser() for name in sources]
    _refuse_hub_options(options, split_has_meaning=any(_is_saved(path) for path in paths))
    parts, versions, skipped = [], [], []
    for path in paths:
        if _is_saved(path):
            part = _open_saved(path, options)
            parts.append(part)
            versions.append([str(path.resolve()), options.split, part.records._fingerprint])
        else:
            files, others = _expand(path)
            parts += [_file_part(file, options) for file in files]
            versions += [_file_version(f) for f in files]
            skipped += others
    if not any(isinstance(part, TextFile) or find_format(part.path).kind in ("json", "csv") for part in parts):
        _refuse_encoding(options)
    size = None
    if all(isinstance(part, TextFile) and find_format(part.path).compression is None for part in parts):
        size = sum(version[1] for version in versions)
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    names = ["files", [str(path.resolve()) for path in paths]]
    description = ", ".join(sources[:3]) + more
    return Source(description, names, hash_json(versions), parts, size, describe_skipped(skipped))


def hash_json(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def find_hub_revision(name: str) -> str | None:
    """The commit of a dataset of the Hub; None when the Hub cannot be asked, or does not know the name."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except (
        Exception
    ):  # of the HTTP client, which is not the same in all versions; loading the dataset says what is wrong
        return None


def _stdlib_source(options: DataOptions) -> Source:
    """The `.py` files of the standard library without its tests, which some distributions leave out."""
    _refuse_hub_options(options, split_has_meaning=False)
    _refuse_encoding(options)
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, below, names in os.walk(root):
        below[:] = set(below) - STDLIB_SKIPPED_FOLDERS
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    versions = [_file_version(path) for path in files]
    keys = [path.relative_to(root).as_posix() for path in files]
    parts = [TextFile(*named, "utf-8", "strict", skip_undecodable=True) for named in zip(files, keys, strict=True)]
    description = f"the source files of Python's standard library in {root}"
    return Source(description, ["stdlib", str(root)], hash_json(versions), parts, sum(v[1] for v in versions))


def _refuse_hub_options(options: DataOptions, *, split_has_meaning: bool) -> None:
    if options.config is not None:
        raise ValueError(f"--data.config {options.config} is for a dataset of the Hub, which --data.sources is not")
    if options.split != "train" and not split_has_meaning:
        raise ValueError(
            f"--data.split {options.split} is for datasets of the Hub or folders written by save_to_disk; files have "
            "no splits, so leave it out"
        )


def _refuse_encoding(options: DataOptions) -> None:
    for name in ("encoding", "encoding_errors"):
        if getattr(options, name) != getattr(DataOptions, name):
            raise ValueError(
                f"{flag_of(f'data.{name}')} {getattr(options, name)} is for text, JSON and CSV files, of which "
                "--data.sources names none; leave it out"
            )


def is_on_hub(sources: list[str]) -> bool:
    """Whether `DataOptions.sources` is one dataset of the Hub: `dataset` or `owner/dataset`, and no path."""
    if len(sources) != 1 or Path(sources[0]).expanduser().exists():
        return False
    (name,) = sources
    _, kind, compression = find_format(Path(name))
    is_file_name = kind is not None or compression is not None
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not is_file_name


def _expand(path: Path) -> Found:
    """A file as it is; for a folder the files of known kinds below it."""
    known = f"known are {' '.join(KNOWN_SUFFIXES)}, and these compressed: {' '.join(COMPRESSIONS)}"
    if path.is_file():
        suffix, kind, _ = find_format(path)
        if suffix and kind is None:
            raise ValueError(
                f"data.sources: {str(path)!r} has the suffix {suffix}, which does not say how to read it; if it is "
                f"one plain text, rename it to {path.name}.txt ({known})"
            )
        return Found([path], [])
    if not path.is_dir():
        raise FileNotFoundError(
            f"data.sources: {str(path)!r} does not exist; give files, folders, or one dataset of the Hub"
        )
    found = find_files(path)
    if not found.files:
        others = describe_skipped(found.skipped)
        raise ValueError(
            f"data.sources: {str(path)!r} is a folder without files of a known kind ({known}){others and '; '}{others}"
        )
    return found


def _file_part(path: Path, options: DataOptions) -> Part:
    if find_format(path).kind in (None, "text"):  # a file without suffix that was named is text
        return TextFile(path, None, options.encoding, options.encoding_errors)
    return TableFile(path, options.text_column, options.encoding, options.encoding_errors)


def _file_version(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _is_saved(path: Path) -> bool:
    """Whether a folder holds what save_to_disk writes for a Dataset or a DatasetDict."""
    files = ("state.json", "dataset_info.json")
    return (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in files)


def _open_saved(path: Path, options: DataOptions) -> SavedDataset:
    from datasets import DatasetDict, load_from_disk

    try:
        opened = load_from_disk(str(path))
    except (ValueError, OSError) as error:
        raise OSError(f"data.sources: {str(path)!r} cannot be read as a saved dataset: {error}") from error
    if isinstance(opened, DatasetDict):
        if options.split not in opened:
            raise ValueError(f"--data.split {options.split} is no split of {path}; use one of {sorted(opened)}")
        return SavedDataset(path, options.text_column, opened[options.split])
    if options.split != "train":
        raise ValueError(f"--data.split {options.split}: {path} holds one dataset without splits; leave it out")
    return SavedDataset(path, options.text_column, opened)
