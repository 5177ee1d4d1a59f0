"""`backend="auto"` where a kernel does not compile or launch: torch runs instead, forward and backward, and warns once.

Here the CPU counts as a CUDA device, and kernels run in Triton's interpreter, so both backends can be compared.
"""

import warnings
from contextlib import nullcontext

import pytest
import torch
from memory_cases import LOCAL_CASES, Case, call, first_state, make_inputs, summarize
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modeling_tnt.kernels import MemoryParams, backends, local_memory, probe, step
from modeling_tnt.kernels.stack import MemoryStack
from modeling_tnt.kernels.step import StepMemory, step_memories

pytest.importorskip("triton")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import KernelInterface

from modeling_tnt.kernels.fused import decode, limits, local_scan, reader

SMALL = {"head_dim": 16, "hidden": 16, "heads": 1, "dtype": torch.float32}
TINY = Case(memory="linear", rule="both", projection="shard", batch=1, length=5, **SMALL)


@pytest.fixture(autouse=True)
def the_cpu_is_a_gpu(monkeypatch):
    if not limits.interpreted():
        pytest.skip("the tensors are on the CPU, where kernels run with TRITON_INTERPRET=1 only")
    choose, choose_step = backends.choose_backend, step.choose_step_backend
    monkeypatch.setattr(backends, "choose_backend", lambda device_type, *call: choose("cuda", *call))
    monkeypatch.setattr(
        step, "choose_step_backend", lambda name, *given: choose_step({"auto": "triton"}.get(name, name), *given)
    )
    monkeypatch.setattr(probe, "_failures", {})
    backends.warn_of_fallback.cache_clear()


class Broken(KernelInterface):
    """A kernel that raises where the compiler or the driver would."""

    def __init__(self, kernel, error: Exception):
        self.fn, self.error, self.launches = kernel.fn, error, 0

    def run(self, *args, **kwargs):
        self.launches += 1
        raise self.error


def nested() -> CompilationError:
    """As of a mistake in a helper: the kernel's own error quotes its source, the cause says what is wrong."""
    error = CompilationError("def kernel():\n    helper()", None, None)
    error.__cause__ = CompilationError("def helper():\n    tl.nonsense()", None, "tl has no nonsense\nmore")
    return error


FAILURES = [
    ("forward_kernel", nested(), "CompilationError: tl has no nonsense)"),
    ("recompute_kernel", RuntimeError("PassManager::run failed"), "RuntimeError: PassManager::run failed)"),
    ("backward_kernel", OutOfResources(999, 512, "tensor memory"), "OutOfResources: out of resource: tensor memory"),
    ("projection_keys_kernel", PTXASError("ptxas fatal\nmore"), "PTXASError: ptxas fatal)"),
    ("backward_kernel", RuntimeError("Triton Error [CUDA]: invalid device function"), "invalid device function)"),
]


def outcome(backend: str, case: Case = TINY) -> dict[str, Tensor]:
    x = make_inputs(case)
    return summarize(*call(case, backend, x), x)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("name, error, said", FAILURES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_kernel_that_fails_is_replaced_by_torch(name: str, error: Exception, said: str, monkeypatch):
    """In the backward, too, of which nothing is known when the forward is asked for; tried once, warned of once."""
    broken = Broken(getattr(local_scan, name), error)
    monkeypatch.setattr(local_scan, name, broken)
    with pytest.warns(UserWarning) as caught:
        got = outcome("auto")
    assert_equal(got, outcome("torch"))
    (message,) = (str(w.message) for w in caught)
    assert message.startswith("backend='auto' runs the torch backend on cuda. ")
    for part in (f"{name} does not compile or launch on cpu with triton 3.", said, "or use backend='torch'"):
        assert part in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(outcome("auto"), got)
    assert broken.launches == 1
    with pytest.raises(type(error)):
        outcome("triton")


def test_without_gradients_a_backward_that_fails_is_not_needed(monkeypatch):
    monkeypatch.setattr(local_scan, "backward_kernel", Broken(local_scan.backward_kernel, RuntimeError("no")))
    x = make_inputs(TINY)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(TINY, "auto", x)[0], call(TINY, "triton", x)[0])
    with pytest.warns(UserWarning, match="backward_kernel does not compile"):
        assert torch.equal(call(TINY, "auto", x)[0], call(TINY, "torch", x)[0])


@pytest.mark.slow
def test_kernels_that_work_are_run(monkeypatch):
    runs = []
    run = probe.ReadConfiguration.run
    monkeypatch.setattr(probe.ReadConfiguration, "run", lambda self: runs.append(self) or run(self))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = outcome("auto")
        outcome("auto", TINY.with_(length=11, batch=2, shard_length=None))
        outcome("auto", TINY.with_(length=9))
    assert_equal(got, outcome("triton"))
    assert [run.options.shard_length for run in runs] == [8, None]  # not once more for another length or batch


def test_a_global_memory_whose_kernels_fail(monkeypatch):
    def scan(*_):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(reader, "scan_global_chunks", scan)
    case = Case(is_global=True, shard_length=None, length=9, **SMALL)
    with pytest.warns(UserWarning, match="a kernel does not compile or launch"):
        got = outcome("auto", case)
    assert_equal(got, outcome("torch", case))


def test_no_memory_for_the_attempt_is_raised_and_not_remembered(monkeypatch):
    broken = Broken(local_scan.forward_kernel, torch.OutOfMemoryError("CUDA out of memory"))
    with monkeypatch.context() as patched:
        patched.setattr(local_scan, "forward_kernel", broken)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                outcome("auto")
    assert broken.launches == 2
    assert_equal(outcome("auto"), outcome("triton"))


def test_a_mistake_of_the_caller_is_still_one():
    x = torch.ones(1, 3, 1, 16)
    with pytest.raises(ValueError, match="lr must have shape"):
        local_memory(x, x, x, x, MemoryParams(torch.ones(1, 16, 16)), chunk_size=2, backend="auto")


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch):
    """A launch of the attempt would be captured with the rest."""
    monkeypatch.setattr(probe.ReadConfiguration, "run", lambda self: pytest.fail("tried in a capture"))
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_available", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        got = call(TINY, "auto", make_inputs(TINY))[0]
    assert torch.equal(got, call(TINY, "triton", make_inputs(TINY))[0]) and not probe._failures


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_the_attempt_does_not_show_to_checkpointing(fails: bool, monkeypatch):
    """Which counts what is saved: as much must be saved when the region is run again."""
    if fails:
        monkeypatch.setattr(local_scan, "backward_kernel", Broken(local_scan.backward_kernel, RuntimeError("no")))
    x = make_inputs(TINY)

    def reading(*tensors: Tensor) -> tuple:
        return call(TINY, "auto", dict(zip(x, tensors, strict=True)))

    with pytest.warns(UserWarning, match="backward_kernel") if fails else nullcontext(), torch.autocast("cpu"):
        o, state = checkpoint(reading, *x.values(), use_reentrant=False)
    got = summarize(o, state, x)
    assert_equal(got, outcome("torch" if fails else "triton"))


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_the_attempt_does_not_show_to_compilation(fails: bool, monkeypatch):
    """It is made while the call is traced, and is no part of the graph."""
    if fails:
        monkeypatch.setattr(local_scan, "backward_kernel", Broken(local_scan.backward_kernel, RuntimeError("no")))
    torch._dynamo.reset()
    x = make_inputs(TINY)
    compiled = torch.compile(
        lambda x: call(TINY, "auto", x, output_final_state=False)[0], fullgraph=not fails, backend="aot_eager"
    )
    got = summarize(compiled(x), None, x)
    torch._dynamo.reset()
    assert len(probe._failures) == 1
    x = make_inputs(TINY)
    want = summarize(call(TINY, "torch" if fails else "triton", x, output_final_state=False)[0], None, x)
    for name, expected in want.items():  # a compiled torch backend may add in another order
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-5)


# The step of decoding ------------------------------------------------------------------------------------------------


@torch.no_grad()
def decoded(backend: str, case: Case) -> dict[str, Tensor]:
    x, outputs = make_inputs(case), []
    stack = MemoryStack([first_state(case, x)])
    params = MemoryParams(**{n.removeprefix("params."): t for n, t in x.items() if n.startswith("params.")})
    for t in range(case.length):
        gates = {name: x[name][:, t] for name in ("lr", "momentum", "decay") if name in x}
        memory = StepMemory(
            params, chunk_size=case.chunk_size, shard_length=case.shard_length, qk_projection="shard", **gates
        )
        outputs.append(step_memories(*(x[name][:, t] for name in "qkv"), [memory], stack, backend=backend))
    return {"o": torch.stack(outputs, 1)} | stack.states[0].tensors()


def test_a_step_whose_kernel_fails_is_done_by_torch(monkeypatch):
    broken = Broken(decode.decode_kernel, OutOfResources(999, 512, "shared memory"))
    monkeypatch.setattr(decode, "decode_kernel", broken)
    with pytest.warns(UserWarning) as caught:
        got = decoded("auto", TINY)
    (message,) = (str(w.message) for w in caught)
    assert "decode_kernel does not compile or launch on cpu with triton 3." in message
    assert_equal(got, decoded("torch", TINY))
    assert broken.launches == 1
    with pytest.raises(OutOfResources):
        decoded("triton", TINY)


def test_a_step_whose_kernel_works_is_done_by_it(monkeypatch):
    runs = []
    run = probe.StepConfiguration.run
    monkeypatch.setattr(probe.StepConfiguration, "run", lambda self: runs.append(self) or run(self))
    assert_equal(decoded("auto", TINY), decoded("triton", TINY))
    assert len(runs) == 1


# The attempt compiles what the call needs ----------------------------------------------------------------------------


def launches(monkeypatch, run) -> set[tuple]:
    """Name and constants of each kernel that is launched within; none is run."""
    found = set()

    def note(kernel, *args, grid, warmup, **sizes):
        constants = {name: value for name, value in sizes.items() if name.isupper() or name.startswith("num_")}
        found.add((kernel.fn.__name__, tuple(sorted(constants.items()))))

    with monkeypatch.context() as patched:
        patched.setattr(type(local_scan.forward_kernel), "run", note)
        run()
    return found


CASES = [
    *(case.with_(**SMALL, length=25, shard_length=None) for case in LOCAL_CASES),
    LOCAL_CASES[1].with_(**SMALL, length=25),  # a shard has two chunks, and the backward one group
    LOCAL_CASES[2].with_(**SMALL, length=11, start=(1, 3), shard_length=None),
    LOCAL_CASES[4].with_(**SMALL, length=70, chunk_size=20, shard_length=None),
    Case(is_global=True, rule="both", shard_length=None, length=15, **SMALL),
    Case(is_global=True, memory="linear", norm=False, shard_length=None, length=15, **SMALL),
]


@pytest.mark.slow
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_compiled_is_what_the_call_needs(case: Case, needs_grad: bool, monkeypatch):
    """The same kernels with the same constants: nothing is compiled in vain, and nothing is left to fail."""
    seen = []
    monkeypatch.setattr(probe, "failure", lambda configuration: seen.append(configuration))
    x = {name: t.detach().requires_grad_(needs_grad) for name, t in make_inputs(case).items()}

    def reading() -> None:
        o, _ = call(case, "auto", x, output_final_state=False)
        if needs_grad:
            o.sum().backward()

    needed = launches(monkeypatch, reading)
    assert needed and launches(monkeypatch, seen[0].run) == needed
