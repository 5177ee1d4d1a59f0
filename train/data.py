"""Text to packed tokens: where documents come from, how they are split, and in which order rows are read."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".cpp", ".js", ".ts", ".rs", ".go")
TABLE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
STDLIB_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document(NamedTuple):
    """One text and the key that decides its side of the split: documents with equal keys are never separated."""

    key: str
    text: str


class Corpus(NamedTuple):
    documents: list[Document]
    description: str


class Split(NamedTuple):
    train: list[Document]
    validation: list[Document]


class PackedTokens(NamedTuple):
    """Documents joined end to end, each followed by the end-of-sequence token.

    tokens [N] int32. token_bytes [N] float32: UTF-8 bytes of text that each token stands for, 0 for the end-of-sequence
    tokens; exact for a byte-level tokenizer, the document's average for others (so exact in sum over documents).
    """

    tokens: Tensor
    token_bytes: Tensor

    def rows(self, seq_len: int) -> PackedTokens:
        """Cut into [rows, seq_len], without the incomplete last row."""
        end = len(self.tokens) // seq_len * seq_len
        return PackedTokens(self.tokens[:end].view(-1, seq_len), self.token_bytes[:end].view(-1, seq_len))


# ---------------------------------------------------------------------------------------------------------- reading


def read_corpus(data: list[str], *, data_config: str | None, text_column: str, limit_bytes: int) -> Corpus:
    """Read documents from `data` (files, folders, or one name of the `datasets` library), or, when it is empty, from
    the source files of Python's standard library, until `limit_bytes` bytes of text are read.

    Raises:
        OSError: for a file that does not exist or cannot be read, or a name that `datasets` cannot load.
        ValueError: for data without any text, a missing column, or a file of an unknown kind.
    """
    if not data:
        stream, description = _stdlib_documents(), f"the source files of Python's standard library in {_stdlib_root()}"
    elif len(data) == 1 and not Path(data[0]).expanduser().exists() and _may_be_dataset_name(data[0]):
        stream, description = _dataset_documents(data[0], data_config, text_column), f"the dataset {data[0]}"
    else:
        stream, description = _file_documents(_expand(data), text_column), ", ".join(data)
    documents, size = [], 0
    for document in stream:
        if document.text:
            documents.append(document)
            size += len(document.text.encode())
        if size >= limit_bytes:
            description += f" (the first {size / 1e6:.1f} MB; --data-limit reads more)"
            break
    if not documents:
        raise ValueError(f"data={data or 'standard library'} holds no text; point --data at files that do")
    return Corpus(documents, description)


def _stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_documents() -> Iterator[Document]:
    """The `.py` files of the standard library without its tests, which some distributions leave out."""
    root = _stdlib_root()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if STDLIB_SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]):
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            yield Document(relative.as_posix(), text)


def _may_be_dataset_name(name: str) -> bool:
    """Whether a name that is no path here could be one on the Hub: `dataset` or `owner/dataset`."""
    suffixes = (*TEXT_SUFFIXES, *TABLE_FORMATS)
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith(suffixes)


def _expand(data: list[str]) -> list[Path]:
    """Files as they are; folders replaced by the files of known kinds below them, in order of path."""
    files = []
    for path in (Path(name).expanduser() for name in data):
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.suffix in (*TEXT_SUFFIXES, *TABLE_FORMATS) and p.is_file()]
            if not found:
                kinds = " ".join((*TEXT_SUFFIXES, *TABLE_FORMATS))
                raise ValueError(f"data={str(path)!r} is a folder without files of a known kind ({kinds})")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"data={str(path)!r} does not exist; give files, folders, or one dataset name")
    return files


def _file_documents(files: list[Path], text_column: str) -> Iterator[Document]:
    """A text file is one document; every record of a JSONL or parquet file is one."""
    for path in files:
        if path.suffix in TABLE_FORMATS:
            yield from _table_documents(path, text_column)
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"data={str(path)!r} is not UTF-8 text ({error}); convert it or leave it out") from error
        yield Document(text, text)


def _table_documents(path: Path, text_column: str) -> Iterator[Document]:
    from datasets import load_dataset  # imported here: the default job does not need it and it takes a second

    if path.stat().st_size == 0:
        return
    try:
        # Streaming reads the file itself; without it `datasets` would write a copy to its cache.
        records = load_dataset(TABLE_FORMATS[path.suffix], data_files=[str(path)], split="train", streaming=True)
        yield from _records_to_documents(records, text_column, str(path))
    except (ValueError, OSError) as error:
        if isinstance(error, _ColumnError):
            raise
        kind = TABLE_FORMATS[path.suffix]
        raise ValueError(f"data={str(path)!r} cannot be read as {kind}: {error}") from error


def _dataset_documents(name: str, data_config: str | None, text_column: str) -> Iterator[Document]:
    from datasets import load_dataset

    try:
        records = load_dataset(name, data_config, split="train", streaming=True)
        yield from _records_to_documents(records, text_column, name)
    except (ValueError, OSError) as error:
        if isinstance(error, _ColumnError):
            raise
        raise OSError(
            f"data={name!r} is no file or folder here, and `datasets` could not load it as a dataset: {error}"
        ) from error


class _ColumnError(ValueError):
    """The text column is missing or holds no text."""


def _records_to_documents(records: object, text_column: str, name: str) -> Iterator[Document]:
    for record in records:
        if text_column not in record:
            raise _ColumnError(
                f"text_column={text_column!r} is no column of {name}; use one of {sorted(record)} (--text-column)"
            )
        text = record[text_column]
        if not isinstance(text, str):
            raise _ColumnError(f"text_column={text_column!r} of {name} holds {type(text).__name__}, not text")
        yield Document(text, text)


# --------------------------------------------------------------------------------------------- splitting and packing


def split_documents(documents: list[Document], validation_share: float) -> Split:
    """Hold out about `validation_share` of the bytes by document.

    Documents are taken in the order of a hash of their key, which depends on nothing else, as long as they fit into
    the share; at least one is. A single document is cut in two, its end being held out.
    """
    if len(documents) == 1:
        key, text = documents[0]
        cut = int(len(text) * (1 - validation_share))
        return Split([Document(key, text[:cut])], [Document(key, text[cut:])])
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(hashlib.sha256(document.key.encode()).hexdigest(), []).append(document)
    if len(groups) == 1:
        raise ValueError("all documents of the data are equal, so none can be held out for validation; add other text")
    sizes = {key: sum(len(d.text.encode()) for d in group) for key, group in groups.items()}
    budget = validation_share * sum(sizes.values())
    held_out: set[str] = set()
    for key in sorted(groups):
        if sizes[key] <= budget:
            held_out.add(key)
            budget -= sizes[key]
    if not held_out:
        held_out.add(min(groups, key=lambda key: (sizes[key], key)))
    sides: dict[bool, list[Document]] = {True: [], False: []}
    for key in sorted(groups):
        sides[key in held_out] += groups[key]
    return Split(train=sides[False], validation=sides[True])


def pack(documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> PackedTokens:
    """Tokenise the documents and join them. Special tokens spelled out in the text are encoded as plain text."""
    tokens, token_bytes = [], []
    for _, text in documents:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        tokens.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32))
        per_token = np.full(len(ids) + 1, len(text.encode()) / max(1, len(ids)), dtype=np.float32)
        per_token[-1] = 0
        token_bytes.append(per_token)
    return PackedTokens(torch.from_numpy(np.concatenate(tokens)), torch.from_numpy(np.concatenate(token_bytes)))


# -------------------------------------------------------------------------------------------------- order of reading


class RowDataset(Dataset):
    """Rows of tokens [rows, seq_len] as the model's inputs; the labels are the inputs, which the model shifts."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.tokens[index].long()
        return {"input_ids": row, "labels": row}


class ShuffledRows(Sampler[int]):
    """Row indices start … start + count − 1 of an endless sequence of epochs, each a permutation drawn from
    (seed, epoch). The position in the data is one number, so a later stage goes on where the one before stopped.
    """

    def __init__(self, num_rows: int, *, seed: int, start: int, count: int):
        self.num_rows, self.seed, self.start, self.count = num_rows, seed, start, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        epoch, order = -1, []
        for position in range(self.start, self.start + self.count):
            if position // self.num_rows != epoch:
                epoch = position // self.num_rows
                generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
                order = torch.randperm(self.num_rows, generator=generator).tolist()
            yield order[position % self.num_rows]
