"""A training step asks its device for nothing: no host waits, and a CUDA graph can capture all of it.

Without a GPU this is shown on the meta device: its tensors have no contents, so that whatever a GPU would be waited for
(an item, a list, nonzero, a mask as an index, a copy to the host) raises an error, and copies from the host, which
would wait for the device unless they come from pinned memory, are seen by a dispatch mode. The code of our operators
runs, and its launches are noted instead of run. What this does not show: that the libraries below do not wait where
torch's operators do not say so, and that the kernels can be captured; the last test does, on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_tnt import TNTConfig, TNTForCausalLM, packing
from modeling_tnt.kernels import MemoryParams, checks, global_memory, initial_memory_state, local_memory, transfer
from modeling_tnt.kernels.torch_backend import projection, scan

pytest.importorskip("triton")

from modeling_tnt.kernels.fused import global_scan, local_scan
from modeling_tnt.kernels.fused.limits import assume_device

META = torch.device("meta")
H200 = ((9, 0), 232448)


class Watch(TorchDispatchMode):
    """Notes what goes between the host and the meta device.

    waits     operators that would wait for a GPU, and do not raise an error on the meta device.
    uploads   shapes of what `to_device` brought there, from pinned memory.
    reads     shapes of what `to_host` brought from there, at once.
    launches  names of kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.uploads: list[torch.Size] = []
        self.reads: list[list[torch.Size]] = []
        self.launches: list[str] = []
        self._contents: list[tuple[Tensor, Tensor]] = []
        self._uploading = False
        operators = [op for m in (local_scan, global_scan, scan, projection) for op in vars(m).values()]
        self._bodies = {op._opoverload: op._init_fn for op in operators if isinstance(op, CustomOpDef)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._bodies:  # instead of what only says the shapes
            with self:
                return self._bodies[func](*args, **kwargs)
        result = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        from_host = any(t.device.type == "cpu" and t.dim() > 0 for t in given)
        on_meta = any(isinstance(t, Tensor) and t.device == META for t in [*given, *tree_leaves(result)])
        masks = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        masks = masks and any(t is not None and t.dtype == torch.bool for t in args[1])
        if on_meta and (masks or from_host) and not self._uploading:
            self.waits.append(str(func))
        return result

    def to_device(self, t: Tensor, device: torch.device) -> Tensor:
        if t.device != device:
            self.uploads.append(t.shape)
        self._uploading = True
        try:
            return t.to(device)
        finally:
            self._uploading = False

    def to_host(self, *tensors: Tensor | None) -> list[Tensor | None]:
        away = [t for t in tensors if t is not None and t.device == META]
        if away:
            self.reads.append([t.shape for t in away])
        return [next((read for there, read in self._contents if there is t), t) for t in tensors]

    def on_meta(self, t: Tensor) -> Tensor:
        """A tensor on the meta device that `to_host` reads as t."""
        self._contents.append((torch.empty(t.shape, dtype=t.dtype, device=META), t))
        return self._contents[-1][0]


@pytest.fixture
def watch(monkeypatch) -> Iterator[Watch]:
    watch = Watch()

    def noting(make: Callable) -> Callable:
        """Of contents of the host's: the meta device makes no copy of them that a dispatch mode sees."""

        def wrapped(*args, **kwargs):
            made = make(*args, **kwargs)
            if made.device == META:
                watch.waits.append(make.__name__)
            return made

        return wrapped

    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name)))
    # Autocast does not know the meta device.
    is_enabled, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device != "meta" and is_enabled(device))
    monkeypatch.setattr(
        torch, "autocast", lambda device, **k: contextlib.nullcontext() if device == "meta" else autocast(device, **k)
    )
    kernels = type(local_scan.forward_kernel)
    monkeypatch.setattr(kernels, "run", lambda kernel, *args, **options: watch.launches.append(kernel.fn.__name__))
    monkeypatch.setattr(transfer, "_KEPT", transfer.KeptNumbers())
    for module in (transfer, packing):
        monkeypatch.setattr(module, "to_device", watch.to_device)
    for module in (checks, packing):
        monkeypatch.setattr(module, "to_host", watch.to_host)
    with assume_device(*H200), watch:
        yield watch


# So that some hundred tokens have jobs, a begun chunk and several shards. The torch backend has a launch a chunk.
SHORT = {"global_chunk_size": 64, "local_chunk_sizes": [16], "local_shard_lengths": 32}


def make_model(watch: Watch, preset: str, backend: str, **changes) -> TNTForCausalLM:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_heads": 2, "head_dim": 32, "intermediate_size": 64}
    config = TNTConfig.from_preset(preset, kernel_backend=backend, vocab_size=96, **sizes, **changes)
    with META:
        model = TNTForCausalLM(config).train()
    watch.waits.clear()  # a model is made of numbers of the host
    return model


def train(model: TNTForCausalLM, shape: tuple[int, int], **given: Tensor) -> None:
    ids = torch.empty(shape, dtype=torch.long, device=META)
    model(input_ids=ids, labels=ids, **given).loss.backward()


PRESETS = ["tnt-150m", "titans-150m", "ttt-linear-125m", "ttt-mlp-125m"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(2, 4096), (3, 4500), (1, 37)], ids=str)
def test_a_training_step_waits_for_nothing_and_copies_nothing_twice(watch: Watch, preset: str, shape: tuple):
    """With lengths that no chunk or shard divides, too."""
    model = make_model(watch, preset, "triton")
    train(model, shape)
    assert watch.waits == [] and watch.reads == []
    assert {"forward_kernel", "recompute_kernel", "backward_kernel"} <= set(watch.launches)
    watch.uploads.clear()
    train(model, shape)
    assert watch.waits == [] and watch.reads == [] and watch.uploads == []


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tnt-150m", "titans-150m"])
def test_nor_does_one_on_the_torch_backend(watch: Watch, preset: str):
    model = make_model(watch, preset, "torch", **SHORT)
    for _ in range(2):
        watch.uploads.clear()
        train(model, (3, 90))
    assert watch.waits == [] and watch.reads == [] and watch.uploads == []


LENGTHS = [150, 20, 3, 257]


def packed(name: str) -> dict[str, Tensor]:
    """430 columns, in two rows, or in one where there are boundaries."""
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).view(2, -1)
    mask = torch.ones(2, 215, dtype=torch.long)
    mask[0, :7] = 0
    return {
        "position_ids": {"position_ids": positions},
        "position_ids of padded rows": {"position_ids": positions, "attention_mask": mask},
        "seq_idx": {"seq_idx": (positions == 0).view(1, -1).cumsum(1).view(2, -1)},
        "attention_mask": {"attention_mask": mask},
        "a mask that hides nothing": {"attention_mask": torch.ones_like(mask)},
        "boundaries": {"cu_seqlens": ends},
        "boundaries under three names": {"cu_seqlens": ends, "cu_seq_lens_q": ends.int(), "cu_seq_lens_k": ends},
    }[name]


@pytest.mark.parametrize("backend, name", [
    *(("triton", name) for name in (
        "position_ids", "position_ids of padded rows", "seq_idx", "attention_mask", "a mask that hides nothing",
        "boundaries", "boundaries under three names",
    )),
    ("torch", "position_ids of padded rows"),
])  # fmt: skip
def test_packing_waits_once_a_step(watch: Watch, name: str, backend: str):
    """For both layers with two memories each, however many tensors say where sequences lie; afterwards for nothing."""
    model, given = make_model(watch, "tnt-150m", backend, **SHORT), packed(name)
    shape = (1, sum(LENGTHS)) if "cu_seqlens" in given else (2, sum(LENGTHS) // 2)
    for _ in range(2):
        watch.uploads.clear()
        watch.reads.clear()
        train(model, shape, **{key: watch.on_meta(t) for key, t in given.items()})
        assert watch.waits == []
        assert [len(read) for read in watch.reads] == [len(given)]
    assert len(watch.uploads) <= 4, "the packing itself, once for all layers"


def test_packing_that_the_host_knows_waits_for_nothing(watch: Watch):
    model = make_model(watch, "tnt-150m", "triton", **SHORT)
    for _ in range(2):
        train(model, (1, sum(LENGTHS)), **packed("boundaries"))
    assert watch.waits == [] and watch.reads == []


@pytest.mark.parametrize("operation, options", [(local_memory, {"shard_length": 16}), (global_memory, {})])
def test_an_operation_asks_for_boundaries_once(watch: Watch, operation: Callable, options: dict):
    """Where they are on the device; the final state costs no second look."""
    q, lr = torch.empty(1, 40, 1, 16, device=META), torch.empty(1, 40, 1, device=META)
    params = MemoryParams(torch.empty(1, 16, 16, device=META, requires_grad=True))
    ends = watch.on_meta(torch.tensor([0, 3, 3, 40]))
    for backend in ("triton", "torch"):
        watch.reads.clear()
        given = {"chunk_size": 8, "cu_seqlens": ends, "output_final_state": True, "backend": backend}
        o, state = operation(q, q, q, lr, params, **given, **options)
        (o.sum() + state.weights.w1.sum()).backward()
        assert watch.reads == [[ends.shape]] and watch.waits == []


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("operation, options", [(local_memory, {"shard_length": 16}), (global_memory, {})])
def test_a_state_whose_position_the_host_knows_costs_no_wait(
    watch: Watch, operation: Callable, options: dict, backend: str
):
    """As that of the rank before, with context parallel: in mid-chunk, and read to a final state."""
    q, lr = torch.empty(2, 30, 1, 16, device=META), torch.empty(2, 30, 1, device=META)
    params = MemoryParams(torch.empty(1, 16, 16, device=META, requires_grad=True))
    state = initial_memory_state(params, 2, with_momentum=False, with_projection=operation is local_memory)
    state = state._replace(position=torch.tensor([3, 8]))
    given = {"chunk_size": 8, "initial_state": state, "output_final_state": True, "backend": backend}
    for _ in range(2):
        watch.uploads.clear()
        o, after = operation(q, q, q, lr, params, **given, **options)
        (o.sum() + after.weights.w1.sum()).backward()
    assert watch.waits == [] and watch.reads == [] and watch.uploads == []
    assert after.position.device == META


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 512), (3, 333)], ids=str)
def test_a_captured_training_step(shape: tuple[int, int]):
    """Replays give the loss and the gradients of plain steps, for other tokens than those of the capture."""
    torch.use_deterministic_algorithms(False)  # which cuBLAS allows only with a setting of the environment
    torch.manual_seed(0)
    config = TNTConfig.from_preset("tiny", kernel_backend="triton")
    model = TNTForCausalLM(config).cuda()
    ids = torch.randint(0, config.vocab_size, shape, device="cuda")

    def step() -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    def results(loss: Tensor) -> list[Tensor]:
        return [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        ids.copy_(torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        got = results(captured)
        held = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        want = results(step())
        for p, grad in zip(model.parameters(), held, strict=True):
            p.grad = grad
        for a, b in zip(got, want, strict=True):  # the same kernels; sums by atomics may come in another order
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
