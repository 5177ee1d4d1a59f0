"""The options of data, and loading the tokenizer that they name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.constants import HF_HOME

from ..options import find_blocked_folder, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOUNDARIES = ("joined", "marked")
ENCODING_ERRORS = ("strict", "replace", "ignore", "backslashreplace")


@dataclass
class DataOptions:
    """Which text is read and how it becomes tokens. The flag of a field: `--data.text-column`."""

    sources: list[str] = option(
        [], "data", "text, JSON, CSV, parquet or arrow files, also compressed (gz, bz2, xz, zst), folders of them "
        "(linked ones are followed), a folder written by save_to_disk, or one dataset of the Hub, which is streamed; "
        "nothing: the source files of Python's standard library",
    )  # fmt: skip
    config: str | None = option(None, "data", "configuration of a dataset of the Hub")
    split: str = option("train", "data", "split of a dataset of the Hub or of a folder written by save_to_disk")
    text_column: str = option("text", "data", "column that holds the text, in anything but text files")
    encoding: str = option("utf-8", "data", "of text, JSON and CSV files, e.g. cp1252, latin-1, utf-16")
    encoding_errors: str = option(
        "strict", "data", f"bytes that are not of the encoding: {', '.join(ENCODING_ERRORS)}; strict: stop"
    )
    limit_megabytes: float = option(64.0, "data", "megabytes (10^6 bytes) of text to read at most; 0: all of it")
    validation_share: float = option(0.05, "data", "share of the documents held out for validation")
    tokenizer: str = option("byt5", "data", "byt5 (bytes, needs no download), or a name or folder for AutoTokenizer")
    boundaries: str = option(
        "joined", "data", "joined: memories run on from one document to the next; marked: they are reset, and nothing "
        "is predicted across a boundary",
    )  # fmt: skip
    cache_dir: Path | None = option(
        None, "data", "folder for tokenised data; by default tnt/tokens in the cache of `datasets`"
    )

    def __post_init__(self) -> None:
        if not isinstance(self.sources, list):
            raise TypeError(f"data.sources must be a list, got {type(self.sources).__name__}; use [{self.sources!r}]")
        if self.cache_dir is not None:
            self.cache_dir = Path(self.cache_dir).expanduser()

    def problems(self) -> list[str]:
        """Every rule that a value breaks, as texts with the flag, the rule and the value."""
        return list(self._find_problems())

    def _find_problems(self) -> Iterable[str]:
        if not 0 <= self.limit_megabytes < float("inf"):
            yield f"--data.limit-megabytes must be at least 0 and finite (0: no limit), got {self.limit_megabytes}"
        if not 0 < self.validation_share < 1:
            yield f"--data.validation-share must lie between 0 and 1, both excluded, got {self.validation_share}"
        if self.boundaries not in BOUNDARIES:
            yield f"--data.boundaries must be joined or marked, got {self.boundaries!r}"
        if self.encoding_errors not in ENCODING_ERRORS:
            choices = ", ".join(ENCODING_ERRORS)
            yield f"--data.encoding-errors must be one of {choices}, got {self.encoding_errors!r}"
        if not _is_text_encoding(self.encoding):
            yield f"--data.encoding must be a text encoding of Python, e.g. utf-8 or cp1252, got {self.encoding!r}"
        for name in ("split", "text_column", "tokenizer"):
            if not getattr(self, name):
                yield f"--data.{name.replace('_', '-')} must not be empty"
        yield from find_blocked_folder(self.find_cache_dir(), "data.cache_dir")

    def find_cache_dir(self) -> Path:
        """The folder for tokenised data: `cache_dir`, or `tnt/tokens` in the cache of `datasets`, wherever HF_HOME or
        HF_DATASETS_CACHE put it (by default ~/.cache/huggingface/datasets)."""
        if self.cache_dir is not None:
            return self.cache_dir
        # The rule of `datasets`, without its import, which takes a second.
        return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets").expanduser() / "tnt" / "tokens"


def _is_text_encoding(name: str) -> bool:
    try:
        "a".encode(name)
    except (LookupError, ValueError):  # ValueError: a zero in the name
        return False
    return True


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer `byt5`, or what AutoTokenizer finds under a name or in a folder. Raises OSError."""
    from transformers import AutoTokenizer, ByT5Tokenizer  # imported here: the command's help needs no tokenizer

    if name == "byt5":
        return ByT5Tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(f"--data.tokenizer {name} could not be loaded: {error}") from error
