"""The cache of tokenised corpora: finds the one that the options name, or makes it.

A corpus is a folder `{what was asked for}-{version of the text}`, both as hashes; `store` says what it holds.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..common.progress import progress_bar
from .encode import Encoder
from .options import DataOptions
from .sources import Document, Source, find_source, hash_json
from .split import SIDES, place_documents
from .store import FORMAT, MANIFEST, PARTIAL, CorpusWriter, TokenizedData, open_corpus

UNKNOWN = "unknown"  # version of a dataset that the Hub cannot be asked for


def load_data(options: DataOptions, tokenizer: PreTrainedTokenizerBase) -> TokenizedData:
    """Tokenise what the options name, or find it tokenised in the cache. Memory use does not grow with the corpus, only
    with its longest document.

    Processes that ask for the same at once wait for the one that came first. A killed tokenisation begins anew.

    Raises:
        OSError: for data that does not exist or cannot be read or loaded, or a cache that cannot be written.
        ValueError: for options that break a rule, data without text, a missing column, or a side without documents.
    """
    problems = options.problems()
    if problems:
        raise ValueError("\n  ".join(["the data cannot be loaded:", *problems]))
    source, encoder, root = find_source(options), Encoder(tokenizer), options.find_cache_dir()
    encoding = [codecs.lookup(options.encoding).name, options.encoding_errors]
    asked = [source.names, options.text_column, *encoding, options.limit_megabytes, options.validation_share]
    name = hash_json([FORMAT, *asked, encoder.fingerprint()])
    folder = root / f"{name}-{source.revision or UNKNOWN}"
    note = f"; {source.skipped}" if source.skipped else ""
    if source.revision is None:
        known = [path.parent for path in root.glob(f"{name}-*/{MANIFEST}") if path.parent.suffix != PARTIAL]
        if known:
            folder = max(known, key=lambda path: path.stat().st_mtime)
            note = " (as it was when last tokenised: the Hub cannot be asked for its version)"
    with _lock(folder):
        corpus = open_corpus(folder) or _tokenise(source, options, encoder, folder)
    return corpus._replace(description=corpus.description + note)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a corpus, which ends with the process. Prints a line when another process holds it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(folder.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print("another process is tokenising the same data; waiting for it ...", file=sys.stderr, flush=True)
            lock.acquire()
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror} in {folder.parent}; give a folder that can be written with --data.cache-dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _tokenise(source: Source, options: DataOptions, encoder: Encoder, folder: Path) -> TokenizedData:
    """Read, split and encode the source into a new corpus, batch by batch."""
    text = _LimitedText(source.description, int(options.limit_megabytes * 1e6))
    with CorpusWriter(folder, encoder.vocabulary) as writer, _progress_bar(source, text.limit) as bar:
        for batch in place_documents(text.read(source.read()), options.validation_share):
            for side in SIDES:
                texts = [placed.text for placed in batch if placed.side == side]
                writer.append(side, encoder(texts), [len(t.encode()) for t in texts])
            bar.update(text.num_bytes - bar.n)
        if text.num_bytes == 0:
            raise ValueError(f"{source.description} holds no text; point --data.sources at files that do")
        for side, documents in writer.num_documents.items():
            if documents == 0:
                raise ValueError(
                    f"no document of {source.description} is on the {side} side; give another --data.validation-share "
                    f"than {options.validation_share}"
                )
        description = source.description
        if text.limited:
            description += f" (the first {text.num_bytes / 1e6:.1f} MB; --data.limit-megabytes reads more)"
        writer.finish(description)
    corpus = open_corpus(folder)
    if corpus is None:
        raise OSError(f"{folder} was changed while it was written; run the same command again")
    return corpus


class _LimitedText:
    """Yields documents that are not empty, up to a limit of UTF-8 bytes, at which the last one is cut."""

    def __init__(self, name: str, limit: int):
        self.name, self.limit, self.num_bytes = name, limit, 0

    @property
    def limited(self) -> bool:
        """Whether the limit ended the reading."""
        return 0 < self.limit <= self.num_bytes

    def read(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            try:
                encoded = document.text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"a document of {self.name} is no Unicode text ({error}); leave it out") from error
            room = self.limit - self.num_bytes if self.limit else len(encoded)
            if len(encoded) > room:
                # Bytes of a cut character are dropped, and counted as read.
                document = document._replace(text=encoded[:room].decode(errors="ignore"))
            self.num_bytes += min(room, len(encoded))
            if document.text:
                yield document
            if self.limited:
                return


def _progress_bar(source: Source, limit: int) -> tqdm:
    """A bar of the bytes of text read; none when it takes less than a second."""
    total = min((size for size in (source.num_bytes, limit) if size), default=None)
    return progress_bar(total, "tokenising", "B", leave=False, unit_scale=True, delay=1)
