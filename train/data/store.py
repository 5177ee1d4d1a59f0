"""The files of a tokenised corpus: opened with their checksums verified, written so that no half of them is opened.

A corpus is a folder with three files for each side of the split, `train.tokens`, `train.starts` and `train.bytes` (see
`Tokens`), and `manifest.json`, which has a checksum for every block of them. While it is written it is called
`….partial`; it gets its name when it is whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .tokens import Tokens, Vocabulary

FORMAT = 2  # changes with the meaning of the files
MANIFEST, PARTIAL = "manifest.json", ".partial"
BLOCK, VERIFIED = 16 << 20, 1 << 30  # bytes that have a checksum of their own, and that are verified at each opening
WRITTEN = {"train": "train", "validation": "read"}  # the validation side is shuffled at the end, from `read`


class TokenizedData(NamedTuple):
    """Both sides of a complete corpus, and its description."""

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
    """The first file found with a wrong checksum, among at most `VERIFIED` bytes of blocks."""
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
    """Checksums of a file's blocks. The file is flushed to the disk first, so that it is there before the rename is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")]


def _sizes(tokens: Tokens) -> list[int]:
    return [len(tokens.tokens), len(tokens.starts), len(tokens.document_bytes)]


class CorpusWriter:
    """Writes the corpus `folder`; a context manager. Leaving it without `finish` removes what was written, entering it
    removes what a killed process left. Raises OSError, with the remedy, where it cannot be written."""

    def __init__(self, folder: Path, vocabulary: Vocabulary):
        self.folder, self.partial, self.vocabulary = folder, folder.with_name(folder.name + PARTIAL), vocabulary
        self.num_tokens, self.num_documents = (dict.fromkeys(WRITTEN, 0) for _ in range(2))

    def __enter__(self) -> CorpusWriter:
        with self._writing():
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        return self

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def append(self, side: str, documents: list[np.ndarray], document_bytes: list[int]) -> None:
        """Append documents, each an array of tokens with its end, and the UTF-8 bytes of their texts."""
        if not documents:
            return
        lengths = [len(tokens) for tokens in documents]
        starts = self.num_tokens[side] + np.cumsum([0, *lengths[:-1]], dtype=np.int64)
        tokens = np.concatenate(documents).astype(self.vocabulary.dtype, copy=False)
        columns = {"tokens": tokens, "starts": starts, "bytes": np.asarray(document_bytes, dtype=np.int64)}
        with self._writing():
            for name, values in columns.items():
                with (self.partial / f"{WRITTEN[side]}.{name}").open("ab") as file:
                    file.write(values.data)
        self.num_tokens[side] += len(tokens)
        self.num_documents[side] += len(documents)

    def finish(self, description: str) -> None:
        """Shuffle the validation documents and give the folder its name; both sides must have a document."""
        with self._writing():
            self._shuffle_validation()
            sides = [Tokens.open(self.partial, side, self.vocabulary) for side in WRITTEN]
            manifest = {
                "description": description, "vocabulary": self.vocabulary, "sizes": [_sizes(side) for side in sides],
                "checksums": {path.name: _checksums(path) for path in sorted(self.partial.iterdir())},
            }  # fmt: skip
            (self.partial / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            shutil.rmtree(self.folder, ignore_errors=True)  # a damaged one
            self.partial.rename(self.folder)

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
        for path in self.partial.glob(f"{WRITTEN['validation']}.*"):
            path.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error} while tokenised data was written to {self.folder.parent}; what was begun "
                "is removed. Make room there, or give another folder with --data.cache-dir",
            ) from error
