"""Which documents are held out."""

from __future__ import annotations

from collections import defaultdict

import pytest

from modeling_tnt.train.data import Document, split
from modeling_tnt.train.data.split import hash_of, place_documents


def _split(documents: list[Document], share: float) -> dict[str, list[str]]:
    sides = defaultdict(list)
    for batch in place_documents(documents, share):
        for side, text in batch:
            sides[side].append(text)
    return sides


def _documents(*texts: str) -> list[Document]:
    return [Document(text, text) for text in texts]


def test_the_share_is_about_met_and_equal_texts_stay_together():
    documents = _documents(*(f"text {i % 3000}" for i in range(6000)))
    sides = _split(documents, 0.2)
    # 3000 draws: standard deviation 0.0073, so five of them.
    assert len(sides["validation"]) / 6000 == pytest.approx(0.2, abs=0.037)
    assert len(sides["train"]) + len(sides["validation"]) == 6000
    assert not set(sides["train"]) & set(sides["validation"])


def test_a_side_does_not_depend_on_order_number_or_batches(monkeypatch: pytest.MonkeyPatch):
    documents = _documents(*(f"text {i}" for i in range(200)))
    whole = {side: set(texts) for side, texts in _split(documents, 0.1).items()}
    assert {side: set(texts) for side, texts in _split(documents[::-1], 0.1).items()} == whole
    assert set(_split(documents[:100], 0.1)["validation"]) == whole["validation"] & {d.text for d in documents[:100]}
    monkeypatch.setattr(split, "BATCH_DOCUMENTS", 7)
    assert {side: set(texts) for side, texts in _split(documents, 0.1).items()} == whole


def test_few_documents():
    """With tiny and huge shares no hash, or every hash, is below; one document moves, with those equal to it."""
    documents = _documents("a", "b", "c", "a", "b", "c")
    by_hash = sorted("abc", key=hash_of)
    assert _split(documents, 1e-9)["validation"] == [by_hash[0]] * 2
    assert _split(documents, 1 - 1e-9)["train"] == [by_hash[-1]] * 2
    with pytest.raises(ValueError, match="all documents of the data are equal"):
        _split(_documents("a", "a", "a"), 0.5)


def test_a_single_document_is_cut_in_two():
    assert _split(_documents("abcdefghij"), 0.2) == {"train": ["abcdefgh"], "validation": ["ij"]}
    assert _split(_documents("ab"), 0.01) == {"train": ["a"], "validation": ["b"]}
    with pytest.raises(ValueError, match="holds one character"):
        _split(_documents("a"), 0.5)


def test_documents_do_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch):
    """A corpus of which nothing is held out is not collected in memory for the chance that it is small."""
    monkeypatch.setattr(split, "BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(split, "WAITING_DOCUMENTS", 50)
    batches = list(place_documents(_documents(*(f"text {i}" for i in range(100))), 1e-9))
    assert [len(batch) for batch in batches] == [60, 10, 10, 10, 10]
