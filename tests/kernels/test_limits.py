"""Which calls the kernels take, and with which tiles, warps and stages. Nothing is compiled or run here."""

import pytest
import torch

from modeling_tnt.kernels import MemoryParams
from modeling_tnt.kernels.checks import MemoryProblem
from modeling_tnt.kernels.types import MemoryGates, MemoryOptions

pytest.importorskip("triton")

from modeling_tnt.kernels.fused import limits
from modeling_tnt.kernels.fused.limits import Tiles, assume_device, obstacle, tiles_for

# Compute capability, bytes of shared memory a block.
A100, H200, B200 = ((8, 0), 166912), ((9, 0), 232448), ((10, 0), 232448)


def problem(
    rows: int = 1, length: int = 32, dtype: torch.dtype = torch.bfloat16, chunk_size: int = 8,
    shard_length: int | None = 2048, linear: bool = False, hidden: int = 128, momentum: bool = False,
) -> MemoryProblem:  # fmt: skip
    """A call in training, of the memory of tnt-150m but for what is given."""
    tokens, gate = (torch.empty(*shape, device="meta") for shape in ((rows, length, 2, 64), (rows, length, 2)))
    tokens = tokens.to(dtype).requires_grad_()
    params = MemoryParams(torch.empty(2, 64, hidden, device="meta"), w2=torch.empty(2, hidden, 64, device="meta"))
    if linear:
        params = MemoryParams(torch.empty(2, 64, 64, device="meta"))
    gates = MemoryGates(gate, gate if momentum else None)
    options = MemoryOptions(chunk_size, shard_length, qk_projection="shard")
    return MemoryProblem(tokens, tokens, tokens, gates, params, options)


def choose(device: tuple, **changes) -> Tiles:
    """What is chosen on a device for `problem(**changes)`."""
    with assume_device(*device):
        return tiles_for(problem(**changes), multi_start=False)


@pytest.mark.parametrize("device", [A100, H200], ids=str)
def test_choices_do_not_depend_on_the_length(device: tuple):
    """Nor on the batch: nothing is compiled anew when only they change."""
    sizes = ((1, 1), (1, 17), (3, 4096), (1, 1 << 20))
    assert len({choose(device, rows=rows, length=length) for rows, length in sizes}) == 1


@pytest.mark.parametrize(
    "capability, tall", [((8, 0), False), ((9, 0), True), ((10, 3), True), ((11, 0), True), ((12, 1), False)]
)
def test_weights_are_held_tall_only_where_groups_of_warps_multiply(capability: tuple, tall: bool):
    """By the compiler: held tall, sm_120 spills 3,432 / 2,236 / 14,548 B in forward, recompute and backward; held wide
    240 / 0 / 1,176."""
    assert choose((capability, 99 * 1024)).tall is tall


@pytest.mark.parametrize(
    "device, changes, warps",
    [(H200, {}, 4), (A100, {}, 8), (H200, {"shard_length": None}, 8), (H200, {"chunk_size": 64}, 8),
     (H200, {"dtype": torch.float32}, 8)],
    ids=str,
)  # fmt: skip
def test_two_programs_share_a_multiprocessor_where_there_are_many_small_ones(device: tuple, changes: dict, warps: int):
    """Many: with shards. Small: without an anchor of their own, with operands of two bytes, held tall."""
    tiles = choose(device, **changes)
    assert (tiles.forward_warps, tiles.recompute_warps, tiles.backward_warps) == (warps, warps, 8)


@pytest.mark.parametrize(
    "changes, rows, multi",
    [({"chunk_size": 8}, 16, False), ({"chunk_size": 17}, 32, False), ({"chunk_size": 64}, 64, False),
     ({"chunk_size": 100}, 64, True), ({"chunk_size": 64, "linear": False}, 16, True),
     ({"chunk_size": 64, "dtype": torch.float32}, 16, True), ({"chunk_size": 64, "momentum": True}, 16, True)],
    ids=str,
)  # fmt: skip
def test_a_small_memory_has_tiles_as_long_as_its_chunks(changes: dict, rows: int, multi: bool):
    """A chunk that is one tile keeps no anchor apart."""
    tiles = choose(H200, **{"linear": True} | changes)
    assert (tiles.rows, tiles.multi) == (rows, multi)


@pytest.mark.parametrize("decay, stages", [(True, 2), (False, 1)])
def test_a_backward_that_the_compiler_never_ends_has_two_stages(decay: bool, stages: int):
    """Of 128 x 128 matrices with both gates, begun in mid-chunk. Compiled, and emulated, by emulated_grid.py."""
    tokens, gate = torch.empty(1, 9, 1, 128, device="meta", dtype=torch.bfloat16), torch.empty(1, 9, 1, device="meta")
    params = MemoryParams(torch.empty(1, 128, 128, device="meta").requires_grad_())
    gates = MemoryGates(gate, gate, gate if decay else None)
    begun = MemoryProblem(tokens, tokens, tokens, gates, params, MemoryOptions(8, 16))
    with assume_device(*H200):
        assert tiles_for(begun, multi_start=True).backward_stages == stages


@pytest.mark.parametrize("device", [A100, B200], ids=str)
def test_tiles_of_more_rows_are_for_groups_of_warps_without_tensor_memory(device: tuple):
    """By the compiler: with 64 rows an MLP of D = 32 takes 768 columns of tensor memory, of which there are 512."""
    assert choose(device, linear=True, chunk_size=64).rows == 16


@pytest.mark.parametrize(
    "device, changes, stages",
    [(H200, {}, (1, 2)), (H200, {"linear": True}, (2, 2)), (A100, {"dtype": torch.float32}, (1, 1))],
    ids=str,
)  # fmt: skip
def test_loads_are_a_tile_ahead_where_there_is_room(device: tuple, changes: dict, stages: tuple[int, int]):
    """In registers for the forward, in shared memory for the backward."""
    tiles = choose(device, **changes)
    assert (tiles.forward_stages, tiles.backward_stages) == stages


@pytest.mark.parametrize("device, stages", [(H200, (1, 1)), (A100, (2, 2))], ids=str)
def test_nothing_is_loaded_ahead_where_the_compiler_leaves_out_a_fence(device: tuple, stages: tuple, monkeypatch):
    """Triton 3.6 on sm_90; on sm_80 no product reads shared memory past its barriers."""
    monkeypatch.setattr(limits, "COPIES_ARE_FENCED", False)
    tiles = choose(device, linear=True)
    assert (tiles.forward_stages, tiles.backward_stages) == stages


@pytest.mark.parametrize(
    "got, columns",
    [
        (problem(chunk_size=16), 0),
        (problem(chunk_size=64, momentum=True), 0),
        (problem(hidden=256), 640),
        (problem(dtype=torch.float32, hidden=64), 0),
        (problem(dtype=torch.float32), 976),
    ],
)
def test_a_backward_has_room_in_tensor_memory(got: MemoryProblem, columns: int):
    """Columns as the compiler takes them. Only Blackwell has such a memory, and only the backward so many sums."""
    with assume_device(*H200):
        assert obstacle(got) is None
    for capability in ((10, 0), (10, 3), (11, 0)):
        with assume_device(capability, B200[1]):
            why = obstacle(got)
            with torch.no_grad():
                assert obstacle(got) is None
        assert why is None if columns == 0 else f"needs {columns} columns of tensor memory, the device has 512" in why
        assert why is None or ("bfloat16" in why) == (got.q.dtype == torch.float32)


@pytest.mark.parametrize("dtype, rows", [(torch.bfloat16, 64), (torch.float32, 32)])
def test_tiles_of_the_projection_fit_into_tensor_memory(dtype: torch.dtype, rows: int):
    """In float32 the projection's backward takes 704 columns with 64 rows, and 256 with 32."""
    assert choose(B200, dtype=dtype).projection_rows == rows
    assert choose(H200, dtype=dtype).projection_rows == 64
