"""Documents of random key-value pairs with a question at the end: needles in text for task `retrieval`.

    qwzt = 4821
    ubka = 0093
    …
    qwzt =

The text goes through the model's own tokenizer, as a user's text would.
"""

from __future__ import annotations

import random
import string
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

KEY_LETTERS = 4
VALUE_DIGITS = 4
MINIMUM_PAIRS = 2
DEPTH_BINS = 5


class Needle(NamedTuple):
    """A document as tokens, [T] int64 without the answer, and the tokens of the answer, [A] int64.

    depth  where the pair that is asked for begins, as a share of the document: 0 at its start.
    pairs  whole pairs in the document, about.
    """

    context: Tensor
    answer: Tensor
    depth: float
    pairs: int


class NeedleFactory:
    """Makes documents of an exact number of tokens; document i of a length depends on the seed, length and i only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int):
        self.tokenizer, self.seed = tokenizer, seed
        with_special, without = tokenizer("a").input_ids, self._encode("a")
        # As the tokenizer begins every text of its own accord (Llama's <s>), so that a model finds what it knows.
        self.prefix = with_special[:1] if with_special[:1] != without[:1] else []
        lines = draw_lines(random.Random(seed), 64, VALUE_DIGITS)
        self.tokens_per_pair = len(self._encode("".join(map(write_line, lines)))) / len(lines)
        self.question_tokens = len(self._encode(_ask(lines[0][0])))

    def make(self, length: int, count: int) -> list[Needle]:
        """`count` documents of `length` tokens each, whose needles lie at depths spread evenly from 0 to 1.

        Raises:
            ValueError: if the length has no room for two pairs and the question.
        """
        return [self._make_one(length, (i + 0.5) / count, i) for i in range(count)]

    def _make_one(self, length: int, depth: float, index: int) -> Needle:
        pairs = int((length - self.question_tokens - len(self.prefix)) / self.tokens_per_pair)
        if pairs < MINIMUM_PAIRS:
            least = int(MINIMUM_PAIRS * self.tokens_per_pair + self.question_tokens + len(self.prefix)) + 1
            raise ValueError(
                f"documents of {length} tokens have no room for {MINIMUM_PAIRS} pairs and a question with this "
                f"tokenizer; use at least {least}"
            )
        draw = random.Random(f"{self.seed}-{length}-{index}")
        # More pairs than fit: the tokens are cut at the front to the exact length, as a window of a longer text.
        lines = draw_lines(draw, pairs + 2 + pairs // 4, digits_for(pairs))
        needle = len(lines) - pairs + min(pairs - 1, int(depth * pairs))
        body = [write_line(line) for line in lines]
        room = length - len(self.prefix)
        while needle < len(lines) - 1 and self._count(body[needle:], lines[needle][0]) > room:
            needle += 1  # pairs of this document are longer than the average
        key, value = lines[needle]
        question, full = "".join(body) + _ask(key), "".join(body) + _ask(key) + f" {value}"
        context, answer = self._split(question, full)
        begins = len(context) - self._count(body[needle:], key)
        offset = len(context) - room
        return Needle(
            context=torch.tensor([*self.prefix, *context[offset:]]),
            answer=torch.tensor(answer),
            depth=(begins - offset) / room,
            pairs=pairs,
        )

    def _split(self, question: str, full: str) -> tuple[list[int], list[int]]:
        """The tokens of the question and those that the answer adds. Where a tokenizer joins the two, the answer
        begins with the token that differs."""
        context, both = self._encode(question), self._encode(full)
        same = next((i for i, (a, b) in enumerate(zip(context, both, strict=False)) if a != b), len(context))
        return both[:same], both[same:]

    def _count(self, body: list[str], key: str) -> int:
        return len(self._encode("".join(body) + _ask(key)))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def digits_for(pairs: int) -> int:
    """Digits of a value in a document of so many pairs: four, or more where there would be too few different values."""
    return max(VALUE_DIGITS, len(str(pairs)) + 1)


def draw_lines(draw: random.Random, count: int, digits: int) -> list[tuple[str, str]]:
    """Pairs of random letters and random digits, in which no key and no value comes twice."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys["".join(draw.choices(string.ascii_lowercase, k=KEY_LETTERS))] = None
    values = draw.sample(range(10**digits), count)
    return [(key, f"{value:0{digits}d}") for key, value in zip(keys, values, strict=True)]


def write_line(line: tuple[str, str]) -> str:
    return f"{line[0]} = {line[1]}\n"


def _ask(key: str) -> str:
    return f"{key} ="
