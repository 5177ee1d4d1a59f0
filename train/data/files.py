"""Kinds of files by suffix, the files of a folder, and decompression."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".cpp", ".js", ".ts", ".rs", ".go")
TABLES = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # as fsspec names them
KNOWN_SUFFIXES = (*TEXT_SUFFIXES, *TABLES)
NAMED = 3  # files that are named of those that are not read


class Format(NamedTuple):
    """What a file is by its name. `suffix`: in small letters, that of the content if it is compressed; `kind`: text, a
    reader of `datasets`, or None for a suffix that is not known; `compression`: as fsspec names it."""

    suffix: str
    kind: str | None
    compression: str | None


def find_format(path: Path) -> Format:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    suffix = "".join((suffixes[:-1] if compression else suffixes)[-1:])
    return Format(suffix, "text" if suffix in TEXT_SUFFIXES else TABLES.get(suffix), compression)


def read_file(path: Path, compression: str | None) -> bytes:
    """A whole file, decompressed. Raises OSError that names it, also for one that is damaged."""
    if compression is None:
        return path.read_bytes()
    from fsspec.compression import compr

    prepare_zstd()
    with path.open("rb") as file:
        try:
            return compr[compression](file, mode="rb").read()
        except Exception as error:  # each library has its own
            raise OSError(f"data.sources: {str(path)!r} cannot be read as {compression}: {error}") from error


def prepare_zstd() -> None:
    """Let fsspec, and `datasets` through it, read zstd through pyarrow, where no package of its own is installed."""
    from fsspec.compression import compr, register_compression

    if "zstd" not in compr:
        register_compression("zstd", lambda file, **_: io.BufferedReader(_Zstd(file)), "zst")


class _Zstd(io.RawIOBase):
    def __init__(self, file: BinaryIO):
        import pyarrow

        self.stream = pyarrow.CompressedInputStream(file, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Found(NamedTuple):
    """Files of a folder in order of path, and what is not read: paths, each with the reason."""

    files: list[Path]
    skipped: list[tuple[Path, str]]


def find_files(folder: Path) -> Found:
    """The files of known kinds below a folder. Linked folders are followed, each real folder once."""
    files, skipped, seen = [], [], set()

    def unreadable(error: OSError) -> None:
        skipped.append((Path(error.filename), "unreadable folder"))

    for here, below, names in os.walk(folder, followlinks=True, onerror=unreadable):
        below.sort()  # of two ways to a folder the first in order of name is taken
        stat = os.stat(here)
        if (stat.st_dev, stat.st_ino) in seen:
            below.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        for path in (Path(here, name) for name in names):
            suffix, kind, _ = find_format(path)
            if not path.is_file():
                skipped.append((path, "broken link" if path.is_symlink() else "special file"))
            elif kind is None:
                skipped.append((path, suffix or "without a suffix"))
            else:
                files.append(path)
    return Found(sorted(files), sorted(skipped))


def describe_skipped(skipped: list[tuple[Path, str]]) -> str:
    """In one line how many files were not read, why, and the first of them; nothing if there are none."""
    if not skipped:
        return ""
    kinds = Counter(reason for _, reason in skipped).most_common()
    counts = [f"{count} {reason}" for reason, count in kinds[:8]] + ["others"] * (len(kinds) > 8)
    names = [str(path) for path, _ in skipped[:NAMED]] + ["..."] * (len(skipped) > NAMED)
    return f"not read: {', '.join(counts)} ({', '.join(names)})"


def reader_options(path: Path, text_column: str, encoding: str, errors: str) -> dict[str, Any]:
    """What `datasets` must be told to read the file of a table as it is."""
    suffix, kind, _ = find_format(path)
    if kind not in ("json", "csv"):
        return {}
    # What is called "utf-8" both readers decode in ways of their own, which mind no `encoding_errors`.
    options = {"encoding": encoding if errors == "strict" else encoding.upper(), "encoding_errors": errors}
    if kind == "csv":
        # Without these pandas takes the texts NA and null for nothing, and 007 for a number.
        options |= {"converters": {text_column: str}, "keep_default_na": False}
        options["sep"] = "\t" if suffix == ".tsv" else ","
    return options
