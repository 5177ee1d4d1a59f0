"""Which documents are held out, decided while they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .sources import Document

SIDES = ("train", "validation")
BATCH_BYTES, BATCH_DOCUMENTS = 4 << 20, 1000
WAITING_BYTES, WAITING_DOCUMENTS = 64 << 20, 20_000


class Placed(NamedTuple):
    """A text and its side of the split: `train` or `validation`."""

    side: str
    text: str


def place_documents(documents: Iterable[Document], share: float) -> Iterator[list[Placed]]:
    """Hold out about `share` of the documents, in batches.

    A document is held out when the hash of its key, as a number from 0 to 1, is below `share`; that depends on nothing
    else, so equal documents are never separated, and neither order nor number of documents matters. Of a few documents
    (those read before both sides have one) at least one is held out, that of the lowest hash, and one is not. A single
    document is cut in two, its end being held out.

    Args:
        documents: read one at a time.
        share: between 0 and 1.

    Raises ValueError for several documents that are all equal.
    """
    waiting: list[Document] = []
    size, begun = 0, False
    for batch in _batches(documents):
        waiting += batch
        size += sum(len(d.text) for d in batch)
        if not begun:
            both = len({hash_of(d.key) < share for d in waiting}) == 2
            many = len(waiting) > 1 and size > WAITING_BYTES or len(waiting) > WAITING_DOCUMENTS
            begun = both or many
        if not begun:
            continue
        yield [Placed(SIDES[hash_of(d.key) < share], d.text) for d in waiting]
        waiting, size = [], 0
    if waiting:
        yield _place_few(waiting, share)


def hash_of(key: str) -> float:
    """SHA-256 of a key as a number, at least 0 and below 1."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def _place_few(documents: list[Document], share: float) -> list[Placed]:
    """For documents that are all on one side: moves the one with the hash nearest to the share to the other."""
    if len(documents) == 1:
        text = documents[0].text
        if len(text) < 2:
            raise ValueError("data.sources holds one character, which cannot be cut into two sides; add more text")
        cut = min(max(1, int(len(text) * (1 - share))), len(text) - 1)
        return [Placed("train", text[:cut]), Placed("validation", text[cut:])]
    hashes = [hash_of(d.key) for d in documents]
    if len(set(hashes)) == 1:
        raise ValueError("all documents of the data are equal, so none can be held out for validation; add other text")
    threshold = max(hashes) if max(hashes) < share else min(set(hashes) - {min(hashes)})
    return [Placed(SIDES[h < threshold], d.text) for h, d in zip(hashes, documents, strict=True)]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents of a bounded number and size."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
