"""Read documents of any length into a `TNTState`, piece by piece, in constant memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .cache import check_cache, map_layer
from .state import TNTState

DEFAULT_CHUNK_LENGTH = 4096


class MemorizeMixin:
    """`memorize` and `load_memory` of a TNT model."""

    @torch.no_grad()
    def memorize(
        self,
        document: str | Sequence[Any] | Tensor | np.ndarray,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        state: TNTState | None = None,
        chunk_length: int = DEFAULT_CHUNK_LENGTH,
        progress: bool = True,
    ) -> TNTState:
        """Read a document of any length, without gradients, in memory that does not depend on the length.

        The result stands before input_ids: `generate(input_ids, cache=state)` continues the document, and
        input_ids hold new tokens only, see `TNTState`.

        Args:
            document: text, or its token ids: a list or array of ints, or a tensor [tokens] or [rows, tokens]. Several
                texts or sequences of ids in a list are rows of a batch, of any lengths (ids without padding). Arrays
                are converted piece by piece, so that a memory-mapped file stays on disk.
            tokenizer: for text. A BOS token is put before a text where the tokenizer itself puts one, unless `state`
                has read something. What it puts after a text (EOS) is left out, since more follows. The ids of a text
                are held as a whole: cut one that is too large for that where it is safe, and read part after part.
            state: an earlier state, of as many rows as the document, which is advanced in place and returned. What it
                read of a conversation stands before input_ids from then on, too.
            chunk_length: tokens of a row that a process reads in one call, at least 1. Results do not depend on it but
                for rounding; memory and time do.
            progress: show a bar, unless transformers' progress bars are disabled.

        With `enable_context_parallel` every rank gives the whole document and the same state, reads its part of each
        piece, and has the state after it.

        Returns:
            The state after the document. If reading is interrupted, a state that was given is left after the last whole
            piece: read on from `state.tokens_read`.

        Raises:
            ValueError: an empty document, text without a tokenizer, ids outside of the vocabulary, a state of other
                rows or of another model, or a model with full attention, whose keys would grow with the document.
            TypeError: a document or state of another kind.
        """
        if isinstance(chunk_length, bool) or not isinstance(chunk_length, int) or chunk_length < 1:
            raise ValueError(f"chunk_length must be an int of at least 1 token, got {chunk_length!r}")
        if state is None:
            state = TNTState(self.config)
        elif not hasattr(state, "start_prompt"):
            raise TypeError(
                f"state must be a TNTState, got {type(state).__name__}; make one of another cache of this model with "
                "TNTState.from_cache(cache, model.config)"
            )
        rows = _rows_of_ids(document, tokenizer, is_first=not state.is_initialized)
        check_cache(state, self.config, len(rows))
        state.check_origin(self.memory_origin())
        state.origin = state.origin or self.memory_origin()
        state.start_prompt()
        was_training = self.training
        self.eval()  # gradient checkpointing, in training, excludes a cache
        try:
            self._read_rows(rows, state, chunk_length, progress)
        finally:
            self.train(was_training)
            state.start_prompt()
            # Before a first update a state is a view of the model's parameters, which training changes.
            state.layers = [map_layer(layer, lambda t: t.detach().clone()) for layer in state.layers]
        return state

    def load_memory(self, save_directory: str | os.PathLike) -> TNTState:
        """The state that `state.save_pretrained(save_directory)` wrote, on this model's device; see
        `TNTState.from_pretrained` for what it raises."""
        return TNTState.from_pretrained(save_directory, self, _device_of_inputs(self))

    def memory_origin(self) -> dict[str, Any]:
        """Identify this model in saved states: its name, and a few numbers of the initial fast weights of its first
        and last layers."""
        name = self.config.name_or_path
        layers = list(self.memory_layers().values())
        memories = [memory for layer in (layers[0], layers[-1]) for memory in layer.memories().values()]
        # By name: an adapter of a memory's parameters stands in front of it.
        starts = [next(p.detach() for n, p in m.named_parameters() if n.split(".")[-1] == "w1") for m in memories]
        samples = None  # of weights that are offloaded nothing is known
        if not any(w.is_meta for w in starts):
            samples = torch.cat([w.flatten()[:: max(1, w.numel() // 8)][:8].double().cpu() for w in starts]).tolist()
        return {"model": os.path.basename(name) if os.path.isdir(name) else name, "fingerprint": samples}

    def _read_rows(self, rows: list[Any], state: TNTState, chunk_length: int, progress: bool) -> None:
        lengths = torch.tensor([len(row) for row in rows])
        context = self.context_parallel
        pieces = _pieces(int(lengths.max()), chunk_length * (1 if context is None else context.size))
        progress = progress and (context is None or context.rank == 0)
        with logging.tqdm(
            total=int(lengths.sum()), unit=" tokens", unit_scale=True, desc="memorize", disable=not progress
        ) as bar:
            for begin, end in pieces:
                ids, mask = self._piece(rows, lengths, begin, end)
                kept = _keep(state, end - begin)
                try:
                    self.base_model(input_ids=ids, attention_mask=mask, cache=state, use_cache=True)
                except BaseException:  # KeyboardInterrupt, too: layers that have read the piece go back before it
                    state.layers = kept
                    raise
                state.start_prompt()
                bar.update(int((lengths.clamp(max=end) - begin).clamp(min=0).sum()))

    def _piece(self, rows: list[Any], lengths: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Columns begin to end of the rows, [rows, end − begin], and their mask, or None where there is no padding."""
        ids = torch.zeros(len(rows), end - begin, dtype=torch.int64)
        for row, length, target in zip(rows, lengths.tolist(), ids, strict=True):
            if begin < length:
                target[: length - begin] = _as_ids(row[begin:end])
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            bad = ids[(ids < 0) | (ids >= self.config.vocab_size)][0].item()
            raise ValueError(
                f"document has the token id {bad}, and this model's ids are 0 to {self.config.vocab_size - 1}; use the "
                "tokenizer that the model was trained with"
            )
        device, is_token = _device_of_inputs(self), torch.arange(begin, end) < lengths.unsqueeze(1)
        return ids.to(device), None if lengths.min() >= end else is_token.long().to(device)


def _device_of_inputs(model: Any) -> torch.device:
    """Where a model's inputs go. Offloaded weights are on no device until they are used: hooks move the inputs then."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def _pieces(length: int, chunk_length: int) -> list[tuple[int, int]]:
    """Begin and end of each piece of at most `chunk_length` tokens."""
    return [(begin, min(begin + chunk_length, length)) for begin in range(0, length, chunk_length)]


def _keep(state: TNTState, columns: int) -> list[Any]:
    """A snapshot of the layers. A call of several columns leaves their tensors alone; one of a single column may
    write them in place."""
    return [map_layer(layer, Tensor.clone if columns == 1 else lambda t: t) for layer in state.layers]


def _rows_of_ids(document: Any, tokenizer: PreTrainedTokenizerBase | None, is_first: bool) -> list[Any]:
    """A document as one sequence of token ids for each row, each with a length and slices."""
    if isinstance(document, str) or _holds(document, str):
        texts = [document] if isinstance(document, str) else list(document)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("document must hold texts only, or sequences of ids only, got both")
        if tokenizer is None:
            raise ValueError(
                "document is text, so tokenizer must be given, got None; pass this model's, as "
                "tokenizer=AutoTokenizer.from_pretrained(…), or token ids as the document"
            )
        rows = _tokenize(texts, tokenizer, is_first)
    elif isinstance(document, Mapping) or not (hasattr(document, "__len__") and hasattr(document, "__getitem__")):
        raise TypeError(
            f"document must be text, token ids, or a list of either, got {type(document).__name__}; of a tokenizer's "
            "output pass its input_ids; read an iterator item by item, with state = model.memorize(item, state=state)"
        )
    else:
        rows = _split_rows(document)
    if not rows or any(len(row) == 0 for row in rows):
        raise ValueError("document must hold at least one token in each row, got none; leave such rows out")
    return rows


def _split_rows(document: Any) -> list[Any]:
    dimensions = getattr(document, "ndim", None)
    if dimensions is None:
        if len(document) == 0 or not _is_sequence(document[0]):
            return [document]
        if not all(map(_is_sequence, document)):
            raise TypeError("document must hold sequences of ids only, or ids only, got both")
        return list(document)
    if dimensions not in (1, 2):
        raise ValueError(f"document must have the shape [tokens] or [rows, tokens], got {tuple(document.shape)}")
    return [document] if dimensions == 1 else [document[i] for i in range(document.shape[0])]


def _is_sequence(item: Any) -> bool:
    """Whether an item is a row of ids, and not an id (which may be a tensor or array without dimensions)."""
    return item.ndim > 0 if hasattr(item, "ndim") else hasattr(item, "__len__")


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, is_first: bool) -> list[list[int]]:
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if is_first and bos is not None and list(tokenizer("")["input_ids"][:1]) == [bos]:
        rows = [[bos, *row] for row in rows]
    return rows


def _as_ids(piece: Any) -> Tensor:
    """A slice of a row as int64 on the CPU."""
    if isinstance(piece, Tensor):
        is_integer = not (piece.is_floating_point() or piece.is_complex() or piece.dtype == torch.bool)
    else:
        piece = np.asarray(piece)
        is_integer = piece.dtype.kind in "iu"
    if not is_integer or piece.ndim != 1:
        raise TypeError(f"document must hold integer token ids, got {piece.dtype} of shape {tuple(piece.shape)}")
    return piece.detach().cpu().long() if isinstance(piece, Tensor) else torch.from_numpy(piece.astype(np.int64))


def _holds(document: Any, kind: type) -> bool:
    return isinstance(document, (list, tuple)) and any(isinstance(item, kind) for item in document)
