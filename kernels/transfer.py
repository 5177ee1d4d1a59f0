"""Numbers on their way between the host and a device, without a wait where there need be none.

A copy out of the host's ordinary memory waits until the device has done all that it was given before, and cannot be
captured in a CUDA graph; a copy to the host always waits. So what the host has planned is copied once, out of pinned
memory, and kept; and what the device must tell is asked for all at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Whether what is launched on the device now goes into a CUDA graph."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def to_host(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same values in the host's memory, after a single wait; those that are there already stay as they are.

    Several that come from a device may get the dtype that torch.cat promotes them to.

    Raises:
        ValueError: while a CUDA graph is captured, unless there is nothing to copy.
    """
    away = [t for t in tensors if t is not None and t.device.type != "cpu"]
    if not away:
        return list(tensors)
    device = away[0].device
    if capturing(device):
        raise ValueError(
            "masks, indices and boundaries of sequences are read by the host, and a CUDA graph that is captured cannot "
            f"wait for them, got one on {device}; capture a batch without padding and packing, or keep them on the CPU"
        )
    if len(away) == 1:
        copies = [away[0].cpu()]
    else:
        joined = torch.cat([t.flatten().to(device) for t in away]).cpu()
        parts = joined.split([t.numel() for t in away])
        copies = [part.view(t.shape) for part, t in zip(parts, away, strict=True)]
    copied = iter(copies)
    return [t if t is None or t.device.type == "cpu" else next(copied) for t in tensors]


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """t on the device; nothing waits for it if it comes from the host.

    Raises:
        ValueError: for such a copy while a CUDA graph is captured: a replay would read memory that is gone.
    """
    if device.type != "cuda" or t.device.type != "cpu":
        return t.to(device)
    if capturing(device):
        raise ValueError(
            "padding, packed sequences and other numbers of the host cannot be copied to the device while a CUDA graph "
            "is captured; capture a batch without padding and packing"
        )
    return t.pin_memory().to(device, non_blocking=True)


def on_device(numbers: Sequence[int], like: Tensor, make: Callable[[], Tensor] | None = None) -> Tensor:
    """[len(numbers)] int64 on the device of `like`. It is kept and shared: do not write into it.

    Args:
        make: makes the same tensor of arithmetic on the device, for where nothing can be copied or kept: in a program
            that torch.compile makes, and in a CUDA graph if the numbers have not been on the device before.

    Raises:
        ValueError: in the latter case without `make`.
    """
    if torch.compiler.is_compiling() or type(like) is not Tensor:  # traced, or without contents
        return torch.tensor(numbers, dtype=torch.int64, device=like.device) if make is None else make()
    kept = _KEPT.get(tuple(numbers), like.device)
    if kept is not None:
        return kept
    if make is None:
        raise ValueError(
            "a CUDA graph cannot be captured for sequences that are cut in a way not seen before: the numbers that say "
            "where cannot be copied to the device now; read a batch of this shape once, forward and backward, before "
            "capturing"
        )
    return make()


class KeptNumbers:
    """The lists of numbers that were last put on a device.

    One for each stream, so that no stream reads what another has not copied yet, and memory that is given back is
    reused in order. Those that a CUDA graph reads are kept for ever, as the graph may be.
    """

    def __init__(self, most: int = 256):
        self.most = most
        self._recent: OrderedDict[tuple[tuple[int, ...], torch.device, int], Tensor] = OrderedDict()
        self._of_graphs: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._lock = threading.Lock()  # the backward runs in a thread of its own

    def get(self, numbers: tuple[int, ...], device: torch.device) -> Tensor | None:
        """None if a CUDA graph is being captured and they have not been on the device."""
        with self._lock:
            return self._for_graph(numbers, device) if capturing(device) else self._for_stream(numbers, device)

    def _for_stream(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (numbers, device, stream)
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        with torch.inference_mode(False):  # a tensor of inference mode could not be used in training later
            made = self._recent[key] = to_device(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)
        if len(self._recent) > self.most:
            self._recent.popitem(last=False)
        return made

    def _for_graph(self, numbers: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Of any stream: a capture begins when the device has done what it was given before."""
        if (numbers, device) not in self._of_graphs:
            found = (t for (kept, where, _), t in self._recent.items() if (kept, where) == (numbers, device))
            made = next(found, None)
            if made is None:
                return None
            self._of_graphs[numbers, device] = made
        return self._of_graphs[numbers, device]


_KEPT = KeptNumbers()
