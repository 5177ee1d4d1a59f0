"""Text to token ids, and the fingerprint of a tokenizer in the name of a cached corpus."""

from __future__ import annotations

import json
import sys

import numpy as np
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from .sources import hash_json
from .tokens import Vocabulary

LONG = 10_000_000  # characters of a text that takes long enough to be told of
PROBE = "Ünï çödé — 漢字 🙂 def f(x):\n\treturn x**2  # 12345 </s><s>[CLS]<|endoftext|>"


class Encoder:
    """Encodes documents with a tokenizer; special tokens spelled out in the text are encoded as plain text.

    Raises ValueError for a tokenizer without an end-of-sequence token, which separates documents.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise ValueError(f"--data.tokenizer {name} has no end-of-sequence token, which separates documents")
        self.tokenizer = tokenizer
        special, ids = set(tokenizer.all_special_ids), set(tokenizer.get_vocab().values())
        self.vocabulary = Vocabulary(size=max(ids | special) + 1, num_symbols=len(ids - special) + 1)
        # ByT5's tokens are the bytes shifted, which its own code finds far more slowly than numpy.
        self._is_bytes = type(tokenizer) is ByT5Tokenizer

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """For each text its ids and the end-of-sequence token, [tokens + 1] of the vocabulary's dtype."""
        dtype, eos = self.vocabulary.dtype, self.tokenizer.eos_token_id
        if self._is_bytes:
            shift = np.uint16(self.tokenizer.offset)
            ids = (np.frombuffer(text.encode(), dtype=np.uint8) + shift for text in texts)
        else:
            longest = max(map(len, texts), default=0)
            if longest >= LONG:  # cut in pieces, it could have other tokens at the seams
                print(
                    f"a document of {longest / 1e6:,.0f} million characters is tokenised in one piece, by one thread, "
                    "which takes a second or two for each million; shorter documents are tokenised side by side",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            ids = self.tokenizer(
                texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
            ).input_ids
        return [np.append(np.asarray(row, dtype=dtype), np.asarray([eos], dtype=dtype)) for row in ids]

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the tokenizer's class, vocabulary and rules, whatever its name or folder."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = json.loads(fast.to_str()) if fast is not None else {}
        for left_by_calls in ("truncation", "padding"):
            rules.pop(left_by_calls, None)
        probe = [ids.tolist() for ids in self([PROBE])]
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hash_json([type(self.tokenizer).__name__, self.tokenizer.eos_token_id, vocabulary, rules, probe])
