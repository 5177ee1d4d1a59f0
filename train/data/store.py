"""The files of a tokenised corpus, and how they are written so that a half of them is never taken for the whole.

A corpus is a folder with three files for each side of the split, `train.tokens`, `train.starts` and `train.bytes` (see
`Tokens`), and `manifest.json`, which has a checksum for every block of them. While it is written it is called
`….partial`; the files are appended to, and from time to time `progress.json` is replaced by one that says how long they
are and where reading stopped. Whatever a killed process appended after that is cut off by the next one. The folder gets
its name when it is whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .tokens import Tokens, Vocabulary

FORMAT = 2  # changes with the meaning of the files
MANIFEST, PROGRESS, PARTIAL = "manifest.json", "progress.json", ".partial"
BLOCK, VERIFIED = 16 << 20, 1 << 30  # bytes that have a checksum of their own, and that are verified at each opening
WRITTEN = {"train": "train", "validation": "read"}  # the validation side is shuffled at the end, from `read`


class CacheError(OSError):
    """The cache cannot be written."""


class TokenizedData(NamedTuple):
    """Both sides of a corpus that is whole, and what it is in words."""

    train: Tokens
    validation: Tokens
    description: str


def open_corpus(folder: Path) -> TokenizedData | None:
    """The corpus in a folder; None when there is none, or when its files are not what its manifest says. Of a large one
    some blocks are verified, others each time."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sides = [Tokens.open(folder, side, Vocabulary(*manifest["vocabulary"])) for side in WRITTEN]
        if manifest["sizes"] == [_sizes(tokens) for tokens in sides]:
            wrong = _find_wrong_block(folder, manifest["checksums"])
            if wrong is None:
                return TokenizedData(*sides, manifest["description"])
            print(f"{wrong} of the tokenised data is damaged; it is made again", file=sys.stderr, flush=True)
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # ValueError: a file that is empty, or no JSON
        pass
    return None


def _find_wrong_block(folder: Path, checksums: dict[str, list[int]]) -> Path | None:
    """The first file seen with a block that has another checksum, of as many blocks as may be verified."""
    blocks = [(name, i) for name, known in checksums.items() for i in range(len(known))]
    if len(blocks) * BLOCK > VERIFIED:
        blocks = sorted(random.Random().sample(blocks, max(1, VERIFIED // BLOCK)))
    for name, i in blocks:
        with (folder / name).open("rb") as file:
            file.seek(i * BLOCK)
            if zlib.crc32(file.read(BLOCK)) != checksums[name][i]:
                return folder / name
    return None


def _checksums(path: Path) -> list[int]:
    with path.open("rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")]


def _sizes(tokens: Tokens) -> list[int]:
    return [len(tokens.tokens), len(tokens.starts), len(tokens.document_bytes)]


class CorpusWriter:
    """Writes the corpus `folder`, going on from what a killed process left. Use as a context manager.

    `progress` is what was given to `commit` last, None at the start. Leaving the context after an error keeps what has
    been committed, unless it was an error of writing (CacheError) or of the data (ValueError).
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary):
        self.folder, self.partial = folder, folder.with_name(folder.name + PARTIAL)
        self.vocabulary = vocabulary
        self.progress: dict[str, Any] | None = None
        self.num_tokens = dict.fromkeys(WRITTEN, 0)
        self.num_documents = dict.fromkeys(WRITTEN, 0)
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> CorpusWriter:
        with self._writing():
            self.partial.mkdir(parents=True, exist_ok=True)
            self._restore()
            for side in WRITTEN.values():
                for name in ("tokens", "starts", "bytes"):
                    path = self.partial / f"{side}.{name}"
                    self._files[path.name] = path.open("ab")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        for file in self._files.values():
            with suppress(OSError):  # a full disk, which has been told by a write
                file.close()
        if self.progress is None or isinstance(error, (CacheError, ValueError)):
            shutil.rmtree(self.partial, ignore_errors=True)

    def _restore(self) -> None:
        """Read the progress and cut the files to it; start over where that cannot be done."""
        lengths = {}
        try:
            saved = json.loads((self.partial / PROGRESS).read_text(encoding="utf-8"))
            for side, (documents, tokens) in saved["sides"].items():
                self.num_documents[side], self.num_tokens[side] = documents, tokens
                file = self.partial / WRITTEN[side]
                lengths[file.with_suffix(".tokens")] = tokens * self.vocabulary.dtype.itemsize
                lengths[file.with_suffix(".starts")] = lengths[file.with_suffix(".bytes")] = documents * 8
            whole = all(path.stat().st_size >= length for path, length in lengths.items())
        except (FileNotFoundError, ValueError):
            whole = False
        if whole:
            self.progress = saved["progress"]
            for path, length in lengths.items():
                os.truncate(path, length)
            return
        for path in self.partial.iterdir():
            path.unlink()
        self.num_documents, self.num_tokens = dict.fromkeys(WRITTEN, 0), dict.fromkeys(WRITTEN, 0)

    def append(self, side: str, documents: list[np.ndarray], document_bytes: list[int]) -> None:
        """Append documents, each an array of tokens with its end, and the UTF-8 bytes of their texts."""
        if not documents:
            return
        lengths = [len(tokens) for tokens in documents]
        starts = self.num_tokens[side] + np.cumsum([0, *lengths[:-1]], dtype=np.int64)
        with self._writing():
            self._file(side, "tokens").write(np.concatenate(documents).astype(self.vocabulary.dtype, copy=False).data)
            self._file(side, "starts").write(starts.data)
            self._file(side, "bytes").write(np.asarray(document_bytes, dtype=np.int64).data)
        self.num_tokens[side] += sum(lengths)
        self.num_documents[side] += len(documents)

    def commit(self, progress: dict[str, Any]) -> None:
        """Make what has been appended safe, and `progress` (JSON) with it."""
        with self._writing():
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            sides = {side: [self.num_documents[side], self.num_tokens[side]] for side in WRITTEN}
            _write_json(self.partial / PROGRESS, {"progress": progress, "sides": sides})
        self.progress = progress

    def finish(self, description: str) -> None:
        """Shuffle the validation documents and give the folder its name; both sides must have a document."""
        with self._writing():
            for file in self._files.values():
                file.close()
            self._shuffle_validation()
            sides = [Tokens.open(self.partial, side, self.vocabulary) for side in WRITTEN]
            sizes = [_sizes(tokens) for tokens in sides]
            files = [self.partial / f"{side}.{name}" for side in WRITTEN for name in ("tokens", "starts", "bytes")]
            manifest = {
                "description": description, "vocabulary": self.vocabulary, "sizes": sizes,
                "checksums": {file.name: _checksums(file) for file in files},
            }  # fmt: skip
            _write_json(self.partial / MANIFEST, manifest)
            shutil.rmtree(self.folder, ignore_errors=True)  # a damaged one
            self.partial.rename(self.folder)
            for path in (self.folder / PROGRESS, *self.folder.glob(f"{WRITTEN['validation']}.*")):
                path.unlink(missing_ok=True)

    def _shuffle_validation(self) -> None:
        """Write the held-out documents in random order, so that the first few of them are a fair sample."""
        read = Tokens.open(self.partial, WRITTEN["validation"], self.vocabulary)
        order = np.random.default_rng(0).permutation(read.num_documents)
        ends = np.append(read.starts[1:], read.num_tokens)
        lengths = ends - read.starts
        with (self.partial / "validation.tokens").open("wb") as file:
            for document in order:
                file.write(read.tokens[read.starts[document] : ends[document]].data)
        (np.cumsum(lengths[order]) - lengths[order]).tofile(self.partial / "validation.starts")
        read.document_bytes[order].tofile(self.partial / "validation.bytes")

    def _file(self, side: str, name: str) -> BinaryIO:
        return self._files[f"{WRITTEN[side]}.{name}"]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                error.errno,
                f"{error.strerror or error} while tokenised data was written to {self.folder.parent}; what was begun "
                "is removed. Make room there, or give another folder with --data.cache-dir",
            ) from error


def _write_json(path: Path, value: Any) -> None:
    """Replace a file by one with this value, which is on the disk when this returns."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
