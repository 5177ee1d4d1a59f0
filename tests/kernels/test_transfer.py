"""Numbers of the host on a device: kept for a stream, kept for ever for a CUDA graph, never copied into one."""

import os
from collections.abc import Callable

import pytest
import torch
from memory_cases import Case, call, make_inputs
from torch._subclasses import FakeTensorMode

from modeling_tnt.kernels import transfer
from modeling_tnt.kernels.checks import MemoryProblem
from modeling_tnt.kernels.torch_backend.segments import plan_segments, segment_table
from modeling_tnt.kernels.transfer import KeptNumbers, on_device, to_device, to_host
from modeling_tnt.kernels.types import MemoryGates, MemoryOptions

LIKE = torch.zeros(1)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # see tests/conftest.py


@pytest.fixture
def capture(monkeypatch) -> Callable[[bool], None]:
    """Says whether a CUDA graph is being captured, as if the CPU could. Nothing is kept from before."""
    monkeypatch.setattr(transfer, "_KEPT", KeptNumbers(most=2))
    return lambda yes: monkeypatch.setattr(transfer, "capturing", lambda device: yes)


def test_the_last_lists_are_kept(capture: Callable):
    first = on_device([1, 2], LIKE)
    assert first.tolist() == [1, 2] and first.dtype == torch.int64
    assert on_device((1, 2), LIKE) is first
    on_device([3], LIKE)
    assert on_device([1, 2], LIKE) is first, "the oldest goes, not the one that was made first"
    on_device([4], LIKE)
    on_device([5], LIKE)
    assert on_device([1, 2], LIKE) is not first


def test_what_a_graph_reads_is_kept_for_ever(capture: Callable):
    first = on_device([1, 2], LIKE)
    capture(True)
    assert on_device([1, 2], LIKE) is first
    capture(False)
    for i in range(5):
        on_device([i], LIKE)
    capture(True)
    assert on_device([1, 2], LIKE) is first


def test_nothing_is_copied_into_a_graph(capture: Callable):
    """Numbers that are not there are computed, or the error says what to do."""
    capture(True)
    with pytest.raises(ValueError, match="read a batch of this shape once, forward and backward, before capturing"):
        on_device([1, 2], LIKE)
    assert on_device([1, 2], LIKE, lambda: torch.arange(1, 3)).tolist() == [1, 2]
    with pytest.raises(ValueError, match="capture a batch without padding and packing"):
        to_device(torch.ones(2), torch.device("cuda"))
    with pytest.raises(ValueError, match="capture a batch without padding and packing, or keep them on the CPU"):
        to_host(torch.ones(2), torch.ones(2, device="meta"))
    capture(False)
    assert on_device([1, 2], LIKE) is on_device([1, 2], LIKE), "what was computed in a graph belongs to it"


def test_what_is_kept_serves_training(capture: Callable):
    """Even if it came first in inference mode, or in a mode whose tensors have no contents."""
    with torch.inference_mode():
        assert not on_device([0, 1], LIKE).is_inference()
    weight = torch.ones(2, requires_grad=True)
    weight.index_select(0, on_device([0, 1], LIKE)).sum().backward()
    with FakeTensorMode():
        on_device([7], torch.empty(1))
    assert type(on_device([7], LIKE)) is torch.Tensor


def test_what_the_host_has_stays_as_it_is():
    t = torch.ones(2)
    assert to_host(None, t) == [None, t] and to_host(t)[0] is t


def problem(rows: int, length: int, shard_length: int | None) -> MemoryProblem:
    tokens = torch.empty(rows, length, 1, 4)
    return MemoryProblem(tokens, tokens, tokens, MemoryGates(tokens[..., 0]), None, MemoryOptions(2, shard_length))


@pytest.mark.parametrize("shard_length", [None, 2, 4, 6, 100])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("rows, length", [(1, 1), (3, 4), (2, 13)])
def test_a_computed_table_is_the_planned_one(
    capture: Callable, shard_length: int | None, final: bool, rows: int, length: int
):
    segments = plan_segments([length] * rows, None, 2, shard_length, final)
    capture(True)
    got = segment_table(segments, problem(rows, length, shard_length), final)
    assert got.tolist() == [list(segment) for segment in segments]


on_the_cpu = pytest.mark.skipif(not INTERPRETED, reason="kernels run on CPU tensors with TRITON_INTERPRET=1 only")


@pytest.mark.slow
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=on_the_cpu), "torch"])
@pytest.mark.parametrize("is_global", [False, True], ids=["local", "global"])
def test_a_call_in_a_graph_is_the_same(capture: Callable, backend: str, is_global: bool):
    """Rows of a length that no chunk divides, without an earlier call; packed ones only after one."""
    case = Case(is_global=is_global, head_dim=16, hidden=16, dtype=torch.float32, heads=1, length=11)
    x = {name: t.detach() for name, t in make_inputs(case).items()}
    want, _ = call(case, backend, x)
    transfer._KEPT = KeptNumbers()
    capture(True)
    assert torch.equal(call(case, backend, x)[0], want)

    capture(False)
    case = case.with_(batch=1, length=16)
    x, ends = {name: t.detach() for name, t in make_inputs(case).items()}, torch.tensor([0, 5, 5, 14, 16])
    want, _ = call(case, backend, x, cu_seqlens=ends)
    capture(True)
    assert torch.equal(call(case, backend, x, cu_seqlens=ends)[0], want)
    transfer._KEPT = KeptNumbers()
    with pytest.raises(ValueError, match="read a batch of this shape once"):
        call(case, backend, x, cu_seqlens=ends)
