"""Text to packed tokens: where documents come from, how they are split, and in which order rows are read.

From text to batches: `find_source` reads documents as a stream, `place_documents` holds some out, `Encoder` turns them
into tokens, `CorpusWriter` keeps those in files; `load_data` does all that once and then finds it in the cache. `Rows`
cuts tokens into rows and `RowOrder` says which is read when.
"""

from importlib import import_module

from .options import DataOptions, load_tokenizer

# Loaded when asked for: a recipe needs the options alone, and the others import torch.
_HOMES = {
    "Document": ".sources",
    "RowOrder": ".tokens",
    "Rows": ".tokens",
    "TokenizedData": ".store",
    "Tokens": ".tokens",
    "load_data": ".cache",
    "token_bigram_bits_per_byte": ".bigram",
}

__all__ = ["DataOptions", "load_tokenizer", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
