"""How well a causal language model predicts rows of held-out tokens: the loss of each token, and sums for each row."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from .estimates import Estimate, ratio

LOGITS_AT_A_TIME = 1 << 24  # whose float32 copies (64 MiB each) the cross-entropy needs


@dataclass(frozen=True)
class Scores:
    """Sums over the predicted tokens of each row, on the CPU; [n] for n rows, in their order.

    nats    float64, Σ −ln p(token | what is before it).
    bytes   float64, UTF-8 bytes that the tokens stand for. An end-of-sequence token costs nats and has no bytes.
    labels  int64, how many tokens are predicted: all but the first of a row or, with boundaries, of a sequence.
    """

    nats: Tensor
    bytes: Tensor
    labels: Tensor

    def parts(self, name: str) -> tuple[Tensor, Tensor]:
        """The rows' numerators and denominators of "nats_per_token" or "bits_per_byte"; [n] each."""
        return (self.nats, self.labels) if name == "nats_per_token" else (self.nats / math.log(2), self.bytes)

    @property
    def nats_per_token(self) -> Estimate:
        """`Σ nats / Σ labels`, its error over rows as in `estimates.ratio`."""
        return ratio(*self.parts("nats_per_token"))

    @property
    def perplexity(self) -> Estimate:
        """exp of the nats per token."""
        return self.nats_per_token.exp()

    @property
    def bits_per_byte(self) -> Estimate:
        """`Σ nats / (ln 2 · Σ bytes)`: a ratio of two sums that both vary, its error by the delta method over rows."""
        return ratio(*self.parts("bits_per_byte"))

    def to_json(self) -> dict[str, Any]:
        return {
            "nats_per_token": self.nats_per_token.to_json(), "perplexity": self.perplexity.to_json(),
            "bits_per_byte": self.bits_per_byte.to_json(), "rows": len(self.nats),
            "tokens": int(self.labels.sum()), "bytes": round(self.bytes.sum().item()),
        }  # fmt: skip


class TokenLosses(NamedTuple):
    """The predictions of a batch of b rows, on the CPU; column j is the prediction of the token at position j + 1.

    nats     [b, T − 1] float32, −ln p(token); 0 where nothing is predicted.
    scored   [b, T − 1] bool, where a token is predicted.
    context  [b, T − 1] int64, tokens that the model has read of this sequence before it predicts.
    bytes    [b, T − 1] float32, UTF-8 bytes that the predicted token stands for.
    """

    nats: Tensor
    scored: Tensor
    context: Tensor
    bytes: Tensor

    def sum_rows(self) -> Scores:
        """The sums of each row."""
        text_bytes = (self.bytes * self.scored).double().sum(1)
        return Scores(self.nats.double().sum(1), text_bytes, self.scored.sum(1))


def join_scores(parts: list[Scores]) -> Scores:
    """The scores of the rows of all parts, in order."""
    return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in ("nats", "bytes", "labels")))


def score_rows(
    model: nn.Module,
    rows: Dataset,
    *,
    batch_size: int,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Scores:
    """Score every row of `rows`; see `iterate_losses` for the arguments. Rows are whole: nothing is kept between them.

    Several processes may each score a share of the rows and join the tensors of their `Scores`. Under FSDP every
    forward is a collective operation: each process then needs the same number of batches. The processes of a context
    parallel group read each row together: all of them give the same rows, and each gets the scores of whole rows.
    """
    batches = iterate_losses(model, rows, batch_size=batch_size, device=device, autocast=autocast, on_batch=on_batch)
    return join_scores([losses.sum_rows() for losses in batches])


@torch.no_grad()
def iterate_losses(
    model: nn.Module,
    rows: Dataset,
    *,
    batch_size: int,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[TokenLosses]:
    """Yield the losses of `rows`, batch by batch, in evaluation mode. The model's mode is restored at the end.

    Args:
        model: a causal language model of transformers, or one wrapped by DDP, FSDP or torch.compile. With context
            parallel on, every process of the group gives the same rows and gets the losses of all columns.
        rows: `rows[i]` is {"input_ids": [T], "labels": [T]}, labels not shifted and −100 where nothing is to be
            predicted, and "seq_idx": [T] where rows hold several sequences; `rows.token_bytes(i)` [T] float32.
        batch_size: rows per forward pass.
        device: where the batches go. None: where the first parameter is.
        autocast: dtype of torch.autocast. None: none but what the model itself brings along.
        on_batch: called with the number of rows after each forward pass.

    Raises:
        ValueError: for no rows, or for rows with boundaries and a model that cannot keep sequences apart.
    """
    count = len(rows)
    if count == 0:
        raise ValueError("there are no rows to score; use a smaller sequence length, or more text")
    device = torch.device(next(model.parameters()).device if device is None else device)
    precision = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
    with evaluation_mode(model):
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            batch = default_collate([rows[i] for i in indices])
            inputs = {k: v.to(device) for k, v in _model_inputs(model, batch).items()}
            with precision:
                logits = model(**inputs, use_cache=False).logits
            labels = batch["labels"][:, 1:]
            nats = _token_nats(model, logits, labels.to(device)).cpu()
            token_bytes = torch.stack([torch.as_tensor(rows.token_bytes(i)) for i in indices])[:, 1:]
            yield TokenLosses(nats, labels != -100, _context(batch)[:, 1:], token_bytes)
            if on_batch is not None:
                on_batch(len(indices))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards in the mode that it was in, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _model_inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model's forward takes of a batch: where rows hold several sequences, their index if the model knows it
    (ours does), or else positions that start again, by which transformers' attention masks keep sequences apart.
    """
    inputs = {"input_ids": batch["input_ids"]}
    if "seq_idx" in batch:
        known = inspect.signature(_unwrap(model).forward).parameters
        if "seq_idx" in known:
            inputs["seq_idx"] = batch["seq_idx"]
        elif "position_ids" in known:
            inputs["position_ids"] = _context(batch)
        else:
            raise ValueError(
                f"{type(model).__name__} takes neither seq_idx nor position_ids, so it would read across the "
                "boundaries of documents; use rows with joined documents"
            )
    return inputs


def _unwrap(model: nn.Module) -> nn.Module:
    """The model itself, behind DDP, FSDP and torch.compile."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _context(batch: dict[str, Tensor]) -> Tensor:
    """[b, T]: how many tokens of the same sequence, in this row, are before each."""
    columns = torch.arange(batch["input_ids"].shape[1]).repeat(len(batch["input_ids"]), 1)
    if "seq_idx" not in batch:
        return columns
    index = batch["seq_idx"]
    begins = F.pad(index[:, 1:] != index[:, :-1], (1, 0), value=True)
    return columns - torch.where(begins, columns, 0).cummax(dim=1).values


def _token_nats(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """−ln p of each label, [b, T − 1] float32, labels[:, j] being what column j predicts; 0 where it is −100.

    With context parallel on, `logits` are those of this process's own columns, whose last predicts the first token of
    the next process. The processes exchange the numbers of single tokens, and each gets all of them.
    """
    context_parallel = getattr(_unwrap(model), "context_parallel", None)
    if context_parallel is None:
        return _cross_entropy(logits[:, :-1], labels)
    columns = context_parallel.columns(labels.shape[1] + 1)
    own = labels[:, columns.start : columns.stop]
    nats = labels.new_zeros(labels.shape, dtype=torch.float32)
    nats[:, columns.start : columns.stop] = _cross_entropy(logits[:, : own.shape[1]], own)
    dist.all_reduce(nats, group=context_parallel.group)  # exact: all but one process add 0
    return nats


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−ln softmax(logits)[label] in float32: [b, T, V], [b, T] → [b, T]; 0 where the label is −100."""
    columns = max(1, LOGITS_AT_A_TIME // (logits.shape[0] * logits.shape[2]))
    parts = [
        F.cross_entropy(part.float().flatten(0, 1), target.flatten(), ignore_index=-100, reduction="none")
        .view_as(target)
        for part, target in zip(logits.split(columns, 1), labels.split(columns, 1), strict=True)
    ]  # fmt: skip
    return torch.cat(parts, dim=1)
