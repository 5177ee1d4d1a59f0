"""One new token a row through all memories of a layer: what decoding does, with the state written in place.

For each memory, with the equations of `kernels/api.py` and one token t of each row, at that row's own position:

    before a shard (position ≡ 0 mod shard_length): W := W_init, S := 0, M := 0;   before a chunk: W_anchor := W
    S := momentum S − lr G(W_anchor)        W := (1 − decay) W + S        M := M + k kᵀ/‖k‖²
    local: f(W, M q)      global: f(W_anchor, q)       o = their sum

The "triton" backend does all of it in one launch and never waits for the device, so a step may be captured in a CUDA
graph, and is one operator to `torch.compile`. The "native" backend does it in one call of C++. The "torch" backend does
it in a few operations for all memories, see `torch_backend.step`. `torch.compile` breaks its graph at both. The
reference reads one memory after the other with its `local_memory` and `global_memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .backends import (
    BACKENDS,
    BackendChoice,
    choose_native,
    fall_back,
    missing,
    native_backend,
    report,
    triton_backend,
)  # fmt: skip
from .checks import MemoryProblem, check
from .memories.kinds import type_of
from .stack import MemoryStack
from .torch_backend.step import TorchStep
from .types import MemoryGates, MemoryOptions, MemoryParams, MemoryState, is_of


class StepMemory(NamedTuple):
    """One memory of a layer and the gates of its new token; the fields are those of `local_memory`.

    lr, momentum and decay are [rows, H]; token_scale is [chunk_size]. A global memory has a chunk_size and an update
    only, a local one no update.
    """

    params: MemoryParams
    lr: Tensor
    chunk_size: int
    shard_length: int | None = None
    is_global: bool = False
    qk_projection: str = "none"
    normalize_projection: bool = False
    momentum: Tensor | None = None
    decay: Tensor | None = None
    token_scale: Tensor | None = None
    memory_type: str | None = None
    update: str = "gradient"

    @property
    def step_options(self) -> MemoryOptions:
        return MemoryOptions(
            self.chunk_size, self.shard_length, self.is_global, self.qk_projection, self.normalize_projection,
            self.token_scale is not None, self.memory_type, self.update,
        )  # fmt: skip


def step_memories(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memories: Sequence[StepMemory],
    stack: MemoryStack,
    *,
    active: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Read one token of every row with all memories of a layer; their states in `stack` are advanced in place.

    Equal to one call of `local_memory` or `global_memory` with T = 1 for each memory. For inference: nothing is
    recorded for a backward.

    Under CUDA graphs: step once as usual, which compiles the kernel, and then capture. The graph reads its inputs,
    parameters and states where they lay at the capture; parameters may be updated in place. To go on from other states,
    `stack.fill(states)` between two replays. Under torch.compile the step is one operator, with `fullgraph=True` too.

    Args:
        q, k, v: [rows, H, D] of one floating dtype.
        memories: one `StepMemory` for each memory. They agree in the shapes of their parameters, and in whether they
            have momentum and decay.
        stack: their states, in the same order.
        active: [rows] bool; a row that is not active keeps its states and gets zeros. None: all are.
        backend: "auto" | "reference" | "torch" | "native" | "triton", see `choose_step_backend`. "auto" steps by torch,
            and says so once, where the kernel does not compile or launch.

    Returns:
        o [rows, H, D] in q.dtype, the sum of the memories' outputs in their order.

    Raises:
        ValueError, TypeError: an argument does not fit, or a backend that is named cannot run it.
        RuntimeError: gradients are enabled and an input requires one.
    """
    _check(q, k, v, memories, stack, active)
    choice = _choose(backend, q, memories, stack, active)
    report(choice)
    if choice.name == "triton":
        return triton_backend().step(q, k, v, memories, stack, active)
    if choice.name == "reference":
        return _one_by_one(q, k, v, memories, stack, active)
    gates = MemoryGates(*(_stack_gates([getattr(m, name) for m in memories]) for name in MemoryGates._fields))
    step = native_backend().step if choice.name == "native" else step_checked
    return step(
        q, k, v, gates, tuple(m.step_options for m in memories), [m.params for m in memories],
        [m.token_scale for m in memories], stack, active,
    )  # fmt: skip


def unchecked_step(backend: str, q: Tensor, stack: MemoryStack) -> Callable[..., Tensor] | None:
    """What steps like `step_checked` for a backend that was chosen by `step_backend_for`; None where the backend, or
    states of another device or dtype, leave that to `step_memories`."""
    if stack.weights.device != q.device:
        return None
    if backend == "native":
        return native_backend().step if stack.weights.dtype == torch.float32 else None
    return step_checked if backend == "torch" else None


def layer_step(x: Tensor, stack: MemoryStack, tail: Tensor | None) -> Callable[..., Tensor] | None:
    """`native_backend.layer_step` if it can step a layer that reads x and has these states, of which `tail` is that of
    the convolution; None where they are on another device, or one is float64. For where the backend is "native"."""
    held = [stack.weights] if tail is None else [stack.weights, tail]
    if any(t.device != x.device or t.dtype == torch.float64 for t in held):
        return None
    return native_backend().layer_step


def step_checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: MemoryGates,
    options: tuple[MemoryOptions, ...],
    params: Sequence[MemoryParams],
    token_scales: Sequence[Tensor | None],
    stack: MemoryStack,
    active: Tensor | None,
) -> Tensor:
    """`step_memories` of the torch backend without its checks, which take longer than the step.

    For a caller that makes all arguments itself and has had those of the first token checked.
    """
    if active is None or active.all():
        if not isinstance(stack.stepper, TorchStep) or stack.stepper.options != options:
            stack.stepper = TorchStep(stack, options)
        return stack.stepper(q, k, v, gates, params, token_scales)
    # The rows that have a token, in a stack of their own; seldom, so copies do not matter.
    o, rows = torch.zeros_like(q), active.nonzero().squeeze(1)
    if rows.shape[0] > 0:
        part = stack.select(rows)
        some = gates.map(lambda g: g.index_select(1, rows))
        q, k, v = (t.index_select(0, rows) for t in (q, k, v))
        o.index_copy_(0, rows, step_checked(q, k, v, some, options, params, token_scales, part, None))
        stack.put(rows, part)
    return o


def _stack_gates(gates: list[Tensor | None]) -> Tensor | None:
    return None if gates[0] is None else torch.stack(gates)


def choose_step_backend(
    backend: str, params: MemoryParams, memory_type: str | None = None, update: str = "gradient",
    dtype: torch.dtype | None = None,
) -> BackendChoice:  # fmt: skip
    """The backend that a step of memories with parameters like these runs on, and why; memory_type as in
    `local_memory`, update as in `global_memory`. dtype: of the states; None: of those that parameters like these make.

    "auto" is triton on CUDA and native on a CPU, where their kernel supports the shapes, the dtype and the global
    memory's update, and torch elsewhere.

    Raises:
        ValueError: for an unknown name, and for "native" and "triton" where they cannot run.
    """
    weights = params.fast_weights
    kind, dtype = type_of(memory_type, weights), dtype or torch.promote_types(params.w1.dtype, torch.float32)
    return step_backend_for(backend, kind, len(weights.maps), *params.w1.shape[1:], params.w1.device, update, dtype)


def step_backend_for(
    backend: str, memory_type: str, maps: int, head_dim: int, hidden: int, device: torch.device,
    update: str = "gradient", dtype: torch.dtype = torch.float32,
) -> BackendChoice:  # fmt: skip
    """`choose_step_backend` of memories of this kind with so many maps, the first [head_dim, hidden], on `device`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(map(repr, BACKENDS))}")
    if backend in ("reference", "torch"):
        return BackendChoice(backend, "named by the caller")
    sizes = (memory_type, maps, update, head_dim, hidden, device)
    if backend == "auto" and device.type == "cpu":
        return choose_native(lambda native: native.step_obstacle(*sizes, dtype))
    if backend == "auto" and device.type != "cuda":
        return BackendChoice("torch", f"the torch backend is the fastest one on {device.type}")
    if backend == "native":
        native = missing(backend, device.type) or native_backend().step_obstacle(*sizes, dtype)
        obstacle = native or native_backend().failure()
    else:
        obstacle = missing("triton", device.type) or triton_backend().step_obstacle(*sizes)
    if backend != "auto":
        if obstacle is not None:
            raise ValueError(f'backend="{backend}" cannot run this step: {obstacle}; use "auto" or "torch"')
        return BackendChoice(backend, "named by the caller")
    if obstacle is not None:
        return fall_back("triton", obstacle)
    return BackendChoice("triton", "one launch for all memories of a layer")


def _choose(
    backend: str, q: Tensor, memories: Sequence[StepMemory], stack: MemoryStack, active: Tensor | None
) -> BackendChoice:
    """The backend of one step. "auto" tries Triton's kernel first, once for all steps of a configuration."""
    update = next((m.update for m in memories if m.update != "gradient"), "gradient")
    choice = choose_step_backend(backend, memories[0].params, memories[0].memory_type, update, stack.weights.dtype)
    if backend != "auto" or choice.name != "triton":
        return choice
    failure = triton_backend().step_failure(q, memories, stack, active)
    return choice if failure is None else fall_back("triton", failure)


def _check(
    q: Tensor, k: Tensor, v: Tensor, memories: Sequence[StepMemory], stack: MemoryStack, active: Tensor | None
) -> None:
    """Every check of the arguments; those of each memory are the checks of its own operation."""
    if not isinstance(q, Tensor) or q.dim() != 3:
        raise ValueError(f"q must be a tensor of shape [rows, H, D], got {getattr(q, 'shape', type(q).__name__)}")
    if not is_of(stack, MemoryStack):
        raise TypeError(f"stack must be a MemoryStack, got {type(stack).__name__}")
    if len(memories) != len(stack.states):
        raise ValueError(f"stack holds the states of {len(stack.states)} memories but {len(memories)} are given")
    for i, memory in enumerate(memories):
        if not isinstance(memory, StepMemory):
            raise TypeError(f"memories[{i}] must be a StepMemory, got {type(memory).__name__}")
        check(_problem(memory, q, k, v, stack.states[i]))
        if memory.memory_type != memories[0].memory_type:
            raise ValueError(
                f"memory_type must be the same for all memories of a step, got {memories[0].memory_type!r} for "
                f"memories[0] and {memory.memory_type!r} for memories[{i}]; step them apart"
            )
        # Shapes and momentum agree as the states do; this is what the states do not show.
        for name, given in (("norm_weight", memory.params.norm_weight), ("decay", memory.decay)):
            first = memories[0].decay if name == "decay" else memories[0].params.norm_weight
            if (given is None) != (first is None):
                raise ValueError(
                    f"{name} must be given for all memories of a step or for none; memories[0] and memories[{i}] "
                    "differ; step them apart"
                )
    if active is not None:
        if not isinstance(active, Tensor) or active.dtype != torch.bool or active.shape != q.shape[:1]:
            raise ValueError(f"active must be a bool tensor of shape [rows] = ({q.shape[0]},), got {active!r:.80}")
        if active.device != q.device:
            raise ValueError(f"active is on {active.device} but q is on {q.device}; move it there")
    if torch.is_grad_enabled() and any(t.requires_grad for t in _differentiable(q, k, v, memories)):
        raise RuntimeError(
            "step_memories has no backward, but gradients are enabled and an input requires one; call it under "
            "torch.no_grad(), or use local_memory and global_memory"
        )


def _problem(memory: StepMemory, q: Tensor, k: Tensor, v: Tensor, state: MemoryState) -> MemoryProblem:
    """The call of the memory's own operation that a step of it is equal to, for T = 1."""

    def with_time(x: Tensor | None) -> Tensor | None:
        return x.unsqueeze(1) if isinstance(x, Tensor) else x  # what is no tensor is left to the checks

    gates = MemoryGates(*(with_time(gate) for gate in (memory.lr, memory.momentum, memory.decay)))
    return MemoryProblem(
        *(with_time(x) for x in (q, k, v)), gates, memory.params, memory.step_options, memory.token_scale,
        initial_state=state,
    )  # fmt: skip


def _differentiable(q: Tensor, k: Tensor, v: Tensor, memories: Sequence[StepMemory]) -> list[Tensor]:
    tensors = [q, k, v]
    for memory in memories:
        tensors += [*memory.params, memory.lr, memory.momentum, memory.decay, memory.token_scale]
    return [t for t in tensors if t is not None]


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memories: Sequence[StepMemory],
    stack: MemoryStack,
    active: Tensor | None,
) -> Tensor:
    """Every memory by the reference of its operation, for one token."""
    total, states = 0.0, []
    for memory, state in zip(memories, stack.states, strict=True):
        o, new = reference.read(_problem(memory, q, k, v, state), output_final_state=True)
        if active is not None:
            o = torch.where(active.view(-1, 1, 1, 1), o, 0)
            new = MemoryState.from_tensors(
                {
                    name: torch.where(active.view(-1, *[1] * (t.dim() - 1)), t, state.tensors()[name])
                    for name, t in new.tensors().items()
                }
            )
        total = total + o.squeeze(1)
        states.append(new)
    stack.fill(states)
    return total
