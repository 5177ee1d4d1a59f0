"""Text to packed tokens: where documents come from, how they are split, and in which order rows are read.

From text to batches: `find_source` reads documents as a stream, `place_documents` holds some out, `Encoder` turns them
into tokens, `CorpusWriter` keeps those in files; `load_data` does all that once and then finds it in the cache. `Rows`
cuts tokens into rows and `RowOrder` says which is read when.
"""

from .bigram import token_bigram_bits_per_byte
from .cache import load_data
from .options import DataOptions, load_tokenizer
from .order import RowOrder
from .sources import Document
from .store import TokenizedData
from .tokens import Rows, Tokens

__all__ = [
    "DataOptions",
    "Document",
    "RowOrder",
    "Rows",
    "TokenizedData",
    "Tokens",
    "load_data",
    "load_tokenizer",
    "token_bigram_bits_per_byte",
]
