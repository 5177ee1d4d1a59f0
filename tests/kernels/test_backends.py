"""Which backend runs on a CPU, what is said of it, and what is refused. What kernels can run is test_limits.py's and
test_bad_input.py's; here the native ones are asked nothing: their answers are given."""

import logging
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from modeling_tnt.kernels import (
    MemoryParams,
    MemoryStack,
    StepMemory,
    backends,
    choose_backend,
    choose_step_backend,
    initial_memory_state,
    local_memory,
    native_backend,
    step,
    step_memories,
)
from modeling_tnt.kernels.checks import MemoryProblem
from modeling_tnt.kernels.types import MemoryGates, MemoryOptions

W = torch.zeros(1, 16, 16)
PARAMS = MemoryParams(W)
NO_COMPILER = "no C++ compiler was found; install g++"
BROKEN = "g++ does not compile the kernels (fatal error); name another compiler in CXX"
NOT_MADE_FOR = "the head dim must be a multiple of 16, got 24"


def problem_of(dtype: torch.dtype = torch.float32, device: str = "cpu") -> MemoryProblem:
    """One token and one head."""
    x, gate = torch.ones(1, 1, 1, 16, dtype=dtype, device=device), torch.ones(1, 1, 1, device=device)
    return MemoryProblem(x, x, x, MemoryGates(gate), MemoryParams(W.to(device)), MemoryOptions(4))


@pytest.fixture
def native(monkeypatch) -> Callable[..., None]:
    """Native kernels that can run all, whatever the machine has; called, they give other answers."""

    def answer(**answers: object) -> None:
        for name, value in answers.items():
            monkeypatch.setattr(native_backend, name, lambda *_, value=value: value)

    monkeypatch.delenv("TNT_NATIVE", raising=False)
    answer(missing=None, obstacle=None, step_obstacle=None, failure=None)
    backends.advise.cache_clear()
    return answer


@pytest.fixture
def said(caplog) -> Callable[[], list[str]]:
    """What a user has been told."""
    caplog.set_level(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield lambda: [record.getMessage() for record in caplog.records]


def choices(problem: MemoryProblem | None = None) -> list[backends.BackendChoice]:
    """Of a read and of a step."""
    return [choose_backend("cpu", problem_of() if problem is None else problem), choose_step_backend("auto", PARAMS)]


def named(backend: str) -> list[pytest.ExceptionInfo]:
    """How a read and a step by this backend are refused."""
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot run: .*; or use backend='torch'") as read:
        backends.load_backend(backend, problem_of())
    with pytest.raises(ValueError, match=f'backend="{backend}" cannot run this step: .*; use "auto"') as stepped:
        choose_step_backend(backend, PARAMS)
    return [read, stepped]


def test_a_cpu_runs_the_native_kernels(native, said):
    assert [choice.name for choice in (choose_backend("cpu"), *choices())] == ["native"] * 3
    assert backends.load_backend("auto", problem_of()) is native_backend
    assert backends.load_backend("native", problem_of()) is native_backend
    assert choose_step_backend("native", PARAMS).name == "native"
    assert not said()


def test_what_the_native_kernels_are_not_made_for_is_the_torch_backend_s(native, said):
    """With nothing said, with a compiler and without: no user lacks anything."""
    native(obstacle=NOT_MADE_FOR, step_obstacle=NOT_MADE_FOR, missing=NO_COMPILER)
    for choice in choices():
        assert choice.name == "torch" and NOT_MADE_FOR in choice.reason and not choice.is_fallback
    assert backends.load_backend("auto", problem_of()).__name__.endswith("torch_backend.reader")
    assert not said()
    native(missing=None)
    assert all(NOT_MADE_FOR in str(caught.value) for caught in named("native"))


@pytest.mark.parametrize("lacks", [{"missing": NO_COMPILER}, {"failure": BROKEN}], ids=["compiler", "build"])
def test_who_lacks_something_is_told_once(lacks, native, said):
    native(**lacks)
    (reason,) = lacks.values()
    for choice in (choose_backend("cpu"), *choices()):
        assert choice.name == "torch" and reason in choice.reason and choice.is_fallback
    assert not said(), "to choose is not to run"
    for _ in range(2):
        x, gate = torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1)
        local_memory(x, x, x, gate, PARAMS, chunk_size=2)
        stepped()
    assert len(said()) == 1 and reason in said()[0] and "TNT_NATIVE=0" in said()[0]
    assert all(reason in str(caught.value) for caught in named("native"))


def test_who_wants_none_is_told_nothing(native, said, monkeypatch):
    monkeypatch.setenv("TNT_NATIVE", "0")
    for choice in (choose_backend("cpu"), *choices()):
        assert choice.name == "torch" and "TNT_NATIVE=0" in choice.reason and not choice.is_fallback
    backends.load_backend("auto", problem_of())
    assert not said()


@pytest.mark.native
def test_who_wants_none_and_names_them_is_refused(monkeypatch):
    monkeypatch.setenv("TNT_NATIVE", "0")
    assert all("TNT_NATIVE=0" in str(caught.value) for caught in named("native"))


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_other_devices_run_torch(device: str, native, said):
    choice = choose_backend(device)
    assert choice.name == "torch" and device in choice.reason and not choice.is_fallback
    assert not said()


def test_the_native_kernels_are_for_a_cpu():
    with pytest.raises(ValueError, match="its kernels are for CPUs, and the tensors are on meta; move them to 'cpu'"):
        backends.load_backend("native", problem_of(device="meta"))
    with pytest.raises(ValueError, match="its kernels are for CPUs"):
        choose_step_backend("native", MemoryParams(W.to("meta")))


def test_a_build_that_fails_is_an_obstacle(monkeypatch):
    """And no error of the call."""
    from modeling_tnt.kernels.native import build

    def fail():
        raise RuntimeError(BROKEN)

    monkeypatch.setattr(build, "library", fail)
    assert native_backend.failure() == BROKEN


@pytest.fixture
def in_a_copy(native, monkeypatch) -> Callable[..., None]:
    """As in a checkpoint's copy of the code beside another version of the package, which is asked nothing, or without
    one."""

    def place(installed: bool) -> None:
        def border():
            if not installed:
                raise ImportError("native_backend comes with the package modeling-tnt; pip install modeling-tnt")
            return SimpleNamespace(INTERFACE=backends.INTERFACE + 1)

        monkeypatch.setattr(backends, "native_backend", border)
        monkeypatch.setattr(step, "native_backend", border)
        backends._import_error.cache_clear()

    yield place
    monkeypatch.undo()
    backends._import_error.cache_clear()


def test_a_copy_without_the_package_says_nothing(in_a_copy, said):
    """Who only loads a checkpoint needs no advice about compilers."""
    in_a_copy(installed=False)
    for choice in choices():
        assert choice.name == "torch" and "pip install modeling-tnt" in choice.reason and not choice.is_fallback
    backends.load_backend("auto", problem_of())
    assert not said()
    assert all("pip install modeling-tnt" in str(caught.value) for caught in named("native"))


def test_a_copy_beside_a_package_of_another_version_says_so(in_a_copy, said):
    in_a_copy(installed=True)
    assert [choice.name for choice in choices()] == ["torch"] * 2
    for _ in range(2):
        backends.load_backend("auto", problem_of())
    assert len(said()) == 1 and "import modeling_tnt before the model is loaded" in said()[0]
    assert all("of another version" in str(caught.value) for caught in named("native"))


# The step -------------------------------------------------------------------------------------------------------------


def stepped(dtype: torch.dtype = torch.float32, backend: str = "auto", stack: MemoryStack | None = None):
    x, gate = torch.ones(2, 1, 16, dtype=dtype), torch.full((2, 1), 0.1, dtype=dtype)
    memories = [StepMemory(PARAMS, gate, 4), StepMemory(PARAMS, gate, 4, is_global=True)]
    with torch.no_grad():
        return step_memories(x, x, x, memories, stack or stack_of(), backend=backend)


def stack_of(dtype: torch.dtype = torch.float32) -> MemoryStack:
    state = initial_memory_state(PARAMS, 2, with_momentum=False, with_projection=False, dtype=dtype)
    return MemoryStack([state, state])


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_step_s_arguments_are_those_of_the_torch_step(backend, native, monkeypatch):
    calls = []
    monkeypatch.setattr(native_backend, "step", lambda *call: calls.append(call) or step.step_checked(*call))
    stack = stack_of()
    got = stepped(backend=backend, stack=stack)
    assert len(calls) == 1 and calls[0][7] is stack
    torch.testing.assert_close(got, stepped(backend="torch"), rtol=0, atol=0)


def test_states_of_float64_are_stepped_by_torch(native, monkeypatch):
    """The dtype of the states is asked for, whatever that of the tokens."""
    asked = []
    monkeypatch.setattr(native_backend, "step_obstacle", lambda *call: asked.append(call[-1]) or "float64")
    for dtype in (torch.float32, torch.float64):
        stepped(stack=stack_of(dtype))
    choose_step_backend("auto", PARAMS)
    choose_step_backend("auto", MemoryParams(W.bfloat16()))
    choose_step_backend("auto", MemoryParams(W.double()))
    assert asked == [torch.float32, torch.float64, torch.float32, torch.float32, torch.float64]
    assert step.unchecked_step("native", W, stack_of()) is native_backend.step
    assert step.unchecked_step("native", W, stack_of(torch.float64)) is None


def test_a_stack_goes_from_one_backend_to_the_other(native):
    """What a backend has prepared for a stack is not the other's."""
    stack, other = stack_of(), stack_of()
    for given in (stack, other):
        stepped(backend="torch", stack=given)
    stack.stepper = SimpleNamespace(options=stack.stepper.options)
    torch.testing.assert_close(*(stepped(backend="torch", stack=s) for s in (stack, other)), rtol=0, atol=0)
