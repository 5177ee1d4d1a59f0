"""What the kernels can run, and with which tiles and warps: one rule for launches, for `backend="auto"` and for errors.

The choices follow from head dim, hidden width, chunk size and the kind of state, never from the length of a sequence.
They were made by compiling for sm_80, sm_90 and sm_100 and reading registers and spills (tests/benchmarks/AOT.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch.torch_version import TorchVersion

from ..checks import MemoryProblem

HEAD_DIMS = (16, 32, 64, 128)
MAX_HEAD_DIM = HEAD_DIMS[-1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
MIN_HIDDEN = MIN_ROWS = 16  # tl.dot multiplies no fewer
STEP_HIDDEN_MULTIPLE = 16
# float32 numbers of state that one program may hold, by bytes of an operand: with half precision as many as a
# multiprocessor has registers; float32 operands take so many themselves that more than this compiles for minutes.
MAX_STATE_WORDS = {2: 65536, 4: 16384}
# The same, with which two programs of 4 warps share a multiprocessor and spill little.
MAX_PAIRED_WORDS = {2: 16384, 4: 4096}
# The same, so few that 4 warps hold them beside tiles of more rows.
SMALL_STATE_WORDS = 4096
MAX_ROWS = MAX_PROJECTION_ROWS = 64
# Compute capabilities, without their point, that keep the sums of their products in a tensor memory, and its columns.
# Each sum of a kernel's loop has columns of its own.
WITH_TENSOR_MEMORY = (10, 11)
TENSOR_MEMORY_COLUMNS = 512


# A group of warps may read what a copy ahead of time has put into shared memory only behind a fence, which triton 3.6
# leaves out in some kernels (seen by the emulator).
COPIES_ARE_FENCED = TorchVersion(triton.__version__) >= "3.7"


class Device(NamedTuple):
    """What a choice depends on: compute capability and bytes of shared memory that one block may have."""

    capability: tuple[int, int]
    shared_memory: int


class Tiles(NamedTuple):
    """How a call is cut up: tokens of a tile, whether a chunk's anchor is kept apart, warps of each kernel, tiles whose
    loads the forward and the backward's two kernels have in flight, and how the matrices are held (see tile.py)."""

    rows: int
    projection_rows: int
    multi: bool
    forward_warps: int
    recompute_warps: int
    backward_warps: int
    forward_stages: int
    backward_stages: int
    tall: bool


# Set by `assume_device`, to compile without a GPU.
_assumed: list[Device] = []


@contextlib.contextmanager
def assume_device(capability: tuple[int, int], shared_memory: int) -> Iterator[None]:
    """Choose as for this device whatever the tensors' device is: to compile ahead of time, without a GPU."""
    _assumed.append(Device(capability, shared_memory))
    try:
        yield
    finally:
        _assumed.pop()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 before triton is imported)."""
    return triton.knobs.runtime.interpret


@torch.compiler.assume_constant_result
def device_of(device: torch.device) -> Device | None:
    """The device that kernels for tensors on `device` run on, or None where there is none for them."""
    if _assumed:
        return _assumed[-1]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Device((properties.major, properties.minor), properties.shared_memory_per_block_optin)
    if device.type == "cpu" and interpreted():
        return Device((9, 0), 232448)
    return None


def kind_obstacle(memory_type: str, maps: int) -> str | None:
    """Why the kernels cannot run a kind of memory of so many linear maps, or None."""
    if maps == 1 or (memory_type == "mlp" and maps == 2):
        return None
    return (
        f"its kernels run linear memories and MLP memories of depth 2, got memory_type={memory_type!r} with {maps} "
        "linear maps; use memory_type='mlp' with memory_depth=2"
    )


def update_obstacle(update: str) -> str | None:
    """Why the kernels cannot learn by an update of the global memory, or None."""
    if update == "gradient":
        return None
    return f"the global memory's update (global_update of a model) must be 'gradient', got {update!r}; use that"


def obstacle(problem: MemoryProblem) -> str | None:
    """Why the kernels cannot run a call, with the rule, what was got and the remedy; None if they can."""
    p, params = problem, problem.params
    unknown = update_obstacle(p.options.update) or kind_obstacle(p.kind.name, len(params.fast_weights.maps))
    if unknown is not None:
        return unknown
    device = device_of(p.q.device)
    if device is None:
        return f"it needs a CUDA device (or TRITON_INTERPRET=1), the tensors are on {p.q.device}; move them to 'cuda'"
    if device.capability < MIN_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, {p.q.device} has {'.'.join(map(str, device.capability))}"
    if p.q.dtype not in DTYPES:
        return f"q must be of dtype {', '.join(map(str, DTYPES))}, got {p.q.dtype}"
    D, M = params.w1.shape[1:]
    if D not in HEAD_DIMS:
        return f"the head dim must be one of {HEAD_DIMS}, got {D}"
    if M < MIN_HIDDEN or M & (M - 1):
        return f"the memory's hidden width must be a power of two of at least {MIN_HIDDEN}, got {M}"
    if p.options.is_global:
        return None
    no_room = _no_room(p, device, multi=True)
    if no_room is not None and p.options.chunk_size <= tile_rows(p, device) and not begins_in_mid_chunk(p):
        no_room = _no_room(p, device, multi=False)
    return no_room


def _no_room(p: MemoryProblem, device: Device, multi: bool) -> str | None:
    """Why the state does not stay on the chip, or None. `multi`: a chunk's anchor is kept apart from the state."""
    words, most = _state_words(p, multi), MAX_STATE_WORDS[_operand_bytes(p)]
    remedy = "use bfloat16, " if _operand_bytes(p) == 4 else "use "
    remedy += f"a smaller memory_expansion, a chunk_size up to {MIN_ROWS} or no momentum"
    if words > most:
        return (
            f"the fast weights, with their momentum and the anchor of chunks longer than {MIN_ROWS}, must have at most "
            f"{most} numbers a head to stay on the chip with {p.q.dtype}, got {words}; {remedy}"
        )
    shared = _shared_memory(p, device, multi)
    if shared > device.shared_memory:
        return f"a block needs about {shared} bytes of shared memory, the device has {device.shared_memory}; {remedy}"
    columns = _tensor_memory(p, multi) if device.capability[0] in WITH_TENSOR_MEMORY else 0
    if columns > TENSOR_MEMORY_COLUMNS:
        half = "bfloat16 or " if p.q.element_size() == 4 else ""
        return (
            f"the backward needs {columns} columns of tensor memory, the device has {TENSOR_MEMORY_COLUMNS}; "
            f"use {half}a smaller memory_expansion"
        )
    return None


def step_obstacle(memory_type: str, maps: int, update: str, head_dim: int, hidden: int, on: torch.device) -> str | None:
    """Why the kernel of a step cannot run memories of this kind with so many maps, the first [head_dim, hidden], or
    None if it can."""
    unknown = update_obstacle(update) or kind_obstacle(memory_type, maps)
    if unknown is not None:
        return unknown
    device = device_of(on)
    if device is None or device.capability < MIN_CAPABILITY:
        return (
            f"a step's tensors are on {on}, and it needs an NVIDIA GPU of compute capability 8.0 or newer (or "
            "TRITON_INTERPRET=1: slowly, a CPU)"
        )
    if head_dim not in HEAD_DIMS:
        return f"a step's head dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if hidden % STEP_HIDDEN_MULTIPLE:
        return f"the hidden width of a step's memories must be a multiple of {STEP_HIDDEN_MULTIPLE}, got {hidden}"
    return None


def tiles_for(problem: MemoryProblem, multi_start: bool) -> Tiles:
    """The tiles of a call. `multi_start`: some sequence begins in mid-chunk, at an anchor that is not its state."""
    p = problem
    device = device_of(p.q.device)
    rows = tile_rows(p, device)
    multi = multi_start or p.options.chunk_size > rows
    words = _state_words(p, multi)
    projection_rows = MAX_PROJECTION_ROWS
    if device.capability[0] in WITH_TENSOR_MEMORY and p.q.element_size() == 4:
        projection_rows //= 2  # three products make one in float32, and tensor memory has no room for their sums
    if p.options.qk_projection == "chunk":
        projection_rows = _rows_of_a_chunk(p, projection_rows)
    # Weights held tall pay where a group of warps multiplies (wgmma and its successor). 12.0 and 12.1 have neither.
    tall = device.capability[0] in (9, *WITH_TENSOR_MEMORY)
    warps = backward_warps = 4 if words <= SMALL_STATE_WORDS else 8
    # With shards there are programs enough for two on a multiprocessor, one of which works while the other waits;
    # without, each program's own time counts. Held wide, half the warps spill more than the first-level cache takes.
    if tall and p.options.shard_length is not None and words <= MAX_PAIRED_WORDS[p.q.element_size()]:
        warps = 4
    # A larger state leaves the forward no registers for it.
    forward_stages = 2 if words <= SMALL_STATE_WORDS and p.q.element_size() == 2 else 1
    fits_twice = _shared_memory(p, device, multi, stages=2) <= device.shared_memory
    backward_stages = 2 if fits_twice or (tall and multi and _compiles_without_end(p, rows)) else 1
    if tall and not COPIES_ARE_FENCED:
        forward_stages = backward_stages = 1
    return Tiles(rows, projection_rows, multi, warps, warps, backward_warps, forward_stages, backward_stages, tall)


def _compiles_without_end(p: MemoryProblem, rows: int) -> bool:
    """Whether LLVM takes all memory for a backward of one stage, with triton 3.7.1 but not 3.6. Its two stages take
    189,000 B, less than the bound says."""
    gated = p.gates.momentum is not None and p.gates.decay is not None
    return gated and p.q.shape[-1] == MAX_HEAD_DIM and p.options.chunk_size <= rows


def tile_rows(p: MemoryProblem, device: Device) -> int:
    """Tokens of a tile. A chunk in one tile needs no anchor beside the state, and its products fill the tensor cores.

    But what a tile holds grows with its rows: a large state, float32 operands or the matrices of gates then spill more
    than the caches take, and products of 64 rows take tensor memory where there is one. Before 9.0 nothing multiplies
    64 rows at a time.
    """
    gated = p.gates.momentum is not None or p.gates.decay is not None
    if device.capability[0] != 9 or _matrix_words(p) > SMALL_STATE_WORDS or _operand_bytes(p) > 2 or gated:
        return MIN_ROWS
    return _rows_of_a_chunk(p, MAX_ROWS)


def _rows_of_a_chunk(p: MemoryProblem, most: int) -> int:
    """So many that a chunk is one tile, if `most` allow it."""
    return min(max(MIN_ROWS, triton.next_power_of_2(p.options.chunk_size)), most)


def begins_in_mid_chunk(p: MemoryProblem) -> bool:
    """Whether some sequence does. Waits for the device, so it is asked only where it decides what fits."""
    return p.initial_state is not None and bool((p.initial_state.position % p.options.chunk_size != 0).any())


def _state_words(p: MemoryProblem, multi: bool) -> int:
    """float32 numbers that a program of the backward carries for one head, biases left aside."""
    return (1 + (p.gates.momentum is not None) + multi) * _matrix_words(p)


def _shared_memory(p: MemoryProblem, device: Device, multi: bool, stages: int = 1) -> int:
    """An upper bound, from what the kernels took when they were compiled ahead of time; the backward takes most.

    `stages`: tiles of which the traced states and the tokens (x, k, v, the output's gradient, and up to four numbers of
    each) are loaded at a time.
    """
    copies = 1 + (p.gates.momentum is not None) + multi
    if p.needs_grad:
        copies += 1 + (p.gates.momentum is not None)
    D, M = p.params.w1.shape[1:]
    rows = tile_rows(p, device)
    tiles = rows * (2 * max(D, M) + 3 * rows)
    loads = (1 + (p.gates.momentum is not None) + multi) * _matrix_words(p) + 4 * rows * (D + 2)  # 2: a float32 number
    return (copies * _matrix_words(p) + tiles) * _operand_bytes(p) + (stages - 1) * loads * p.q.element_size()


def gradient_dtype(tokens: torch.dtype) -> torch.dtype:
    """Of gradients that are operands of products; see `tile.gradient_operand`."""
    return torch.float32 if tokens == torch.float16 else tokens


def _operand_bytes(p: MemoryProblem) -> int:
    """Of the widest operands of products."""
    return (gradient_dtype(p.q.dtype) if p.needs_grad else p.q.dtype).itemsize


def _tensor_memory(p: MemoryProblem, multi: bool) -> int:
    """Columns of tensor memory that the backward takes: those of every sum aᵀ δ of a tile, as backward.py has them.

    Each adds to a gradient of the weights, or of what reads also depend on (`second`). Three products make one in
    float32; their operands share 16 columns more. The forward has fewer sums: where its state fits, they do.
    """
    if not p.needs_grad:
        return 0
    second = p.gates.momentum is not None or (p.token_scale is not None and multi)
    sums = 2 + second if p.params.w2 is None else 5 + 2 * second
    D, M = p.params.w1.shape[1:]
    columns = sums * -(-D * M // 128)
    if p.q.element_size() == 4 and torch.get_float32_matmul_precision() == "highest":
        columns = 3 * columns + 16
    return columns


def _matrix_words(p: MemoryProblem) -> int:
    D, M = p.params.w1.shape[1:]
    return D * M * (1 if p.params.w2 is None else 2)
