"""What the models are trained on: documents of key-value lines as in task `retrieval`, and a tokenizer for them."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from ...common.files import atomic_file
from ...evaluation.needles import VALUE_DIGITS, draw_lines, write_line

PAIRS_OF_A_DOCUMENT = (2, 4, 8, 16, 32)
VOCABULARY = 5 + 26**2 + 2 * 10**2  # of the tokenizer
REPEATS = 3  # of each pair, so that two lines in three can be known
SEED = 0


def write_texts(path: Path, megabytes: float) -> None:
    """JSON lines `{"text": ...}` of so many megabytes of text, always the same ones."""
    with atomic_file(path) as fresh, fresh.open("w", encoding="utf-8") as file:
        size = 0
        for text in draw_texts(random.Random(SEED)):
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text)
            if size >= megabytes * 1e6:
                return


def draw_texts(draw: random.Random) -> Iterator[str]:
    """Documents without end: 2 to 32 pairs of the task's keys and values, each thrice, in random order. There is about
    as much text of each number of pairs."""
    weights = [1 / pairs for pairs in PAIRS_OF_A_DOCUMENT]
    while True:
        (pairs,) = draw.choices(PAIRS_OF_A_DOCUMENT, weights)
        lines = draw_lines(draw, pairs, VALUE_DIGITS) * REPEATS
        draw.shuffle(lines)
        yield "".join(map(write_line, lines))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of two letters or two digits a token, so that a small model sees in few tokens what a line says:
    `[qw][zt][ =][ 48][21][\\n]`."""
    letters, digits = product(string.ascii_lowercase, repeat=2), list(product(string.digits, repeat=2))
    words = ["<pad>", "</s>", "<unk>", "\n", " =", *map("".join, letters)]
    words += [space + "".join(pair) for space in ("", " ") for pair in digits]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[a-z]{2}| =| ?[0-9]{2}|\n"), "isolated")
    tokenizer.decoder = Fuse()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
