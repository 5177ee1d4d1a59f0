"""What the kernels can run, and with which tiles and warps: one rule for the launches, for `backend="auto"` and for errors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton

HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_ROWS = 16  # tl.dot multiplies no fewer
MIN_CAPABILITY = (8, 0)

# Tests and ahead-of-time compilation stand in for a device here.
_assumed: list[Device] = []


class Device(NamedTuple):
    """What a choice depends on: compute capability and bytes of shared memory that one block may have."""

    capability: tuple[int, int]
    shared_memory: int


class Memory(NamedTuple):
    """What a memory needs on chip: head dim D, hidden width M (D for a linear memory), and which state it carries."""

    head_dim: int
    hidden: int
    is_mlp: bool
    momentum: bool
    multi: bool  # anchor and current state differ: chunks longer than a tile, or a start in mid-chunk
    projection: bool

    @property
    def state_words(self) -> int:
        """float32 entries of one copy of the weights."""
        return self.head_dim * self.hidden * (2 if self.is_mlp else 1)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 when they were imported)."""
    return triton.knobs.runtime.interpret


@contextlib.contextmanager
def assume_device(capability: tuple[int, int], shared_memory: int) -> Iterator[None]:
    """Choose as for this device, whatever the tensors' device is, and accept CPU tensors; for ahead-of-time compilation."""
    _assumed.append(Device(capability, shared_memory))
    try:
        yield
    finally:
        _assumed.pop()


def device_of(device: torch.device) -> Device | None:
    """The device that kernels for tensors on `device` run on, or None where there is none for them."""
    if _assumed:
        return _assumed[-1]
    if device.type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(device)
        return Device((properties.major, properties.minor), properties.shared_memory_per_block_optin)
    if device.type == "cpu" and interpreted():
        return Device((9, 0), 232448)
    return None


class Tiles(NamedTuple):
    """How a call is cut up: rows of a tile, whether a chunk's anchor is kept apart, warps of each kernel."""

    rows: int
    projection_rows: int
    multi: bool
    forward_warps: int
    recompute_warps: int
    backward_warps: int


def tiles_for(p, multi_start: bool) -> Tiles:
    rows = MIN_ROWS
    multi = multi_start or p.chunk_size > rows
    return Tiles(rows, 16, multi, 8, 8, 8)
