"""Whether the kernels of a call compile and launch on a device: found out by running them once, on a few zeros.

`backend="auto"` asks before it picks Triton's kernels, so that a compiler or driver that fails is found out before
anything of the call has run, its backward included. The same operation is run on a problem that needs the same
binaries, so the call itself then finds them compiled; only the sizes that no kernel of a local memory is specialised
on (tokens, rows, segments) are smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import MemoryProblem
from .stack import MemoryStack
from .step import StepMemory
from .types import MemoryGates, MemoryOptions, MemoryParams, initial_memory_state


class ReadConfiguration(NamedTuple):
    """What the binaries of a call of `local_memory` or `global_memory` depend on.

    sizes   H, D, M
    params  which of `MemoryParams` there are; gates: which of `MemoryGates`
    """

    device: torch.device
    dtype: torch.dtype
    sizes: tuple[int, int, int]
    params: tuple[bool, ...]
    gates: tuple[bool, ...]
    options: MemoryOptions
    begins_in_mid_chunk: bool
    needs_grad: bool

    @classmethod
    def of(cls, problem: MemoryProblem) -> ReadConfiguration:
        from .fused.limits import begins_in_mid_chunk, device_of, tile_rows

        p, options, in_mid_chunk = problem, problem.options, False
        # Longer chunks are cut into tiles, which is the same to the kernels as a start in mid-chunk.
        if not options.is_global and 1 < options.chunk_size <= tile_rows(p, device_of(p.q.device)):
            in_mid_chunk = begins_in_mid_chunk(p)
        return cls(
            p.q.device, p.q.dtype, tuple(p.params.w1.shape), _present(p.params), _present(p.gates), options,
            in_mid_chunk, p.needs_grad,
        )  # fmt: skip

    def run(self) -> None:
        from .fused import reader

        with torch.set_grad_enabled(self.needs_grad):
            o, _ = reader.read(self.problem(), output_final_state=False)
            if self.needs_grad:
                o.sum().backward()

    def problem(self) -> MemoryProblem:
        """Zeros in three chunks: the backward then goes through two groups, as it does over any longer sequence."""
        (H, D, _), options = self.sizes, self.options
        T = 2 * options.chunk_size + 1
        like = {"device": self.device, "requires_grad": self.needs_grad}
        q, k, v = (torch.zeros(1, T, H, D, dtype=self.dtype, **like) for _ in range(3))
        gates = MemoryGates(*(torch.zeros(1, T, H, **like) if there else None for there in self.gates))
        token_scale = torch.zeros(options.chunk_size, **like) if options.has_token_scale else None
        params, state = _zero_params(self.sizes, self.params, torch.float32, self.device), None
        if self.begins_in_mid_chunk:
            state = initial_memory_state(
                params, 1, with_momentum=gates.momentum is not None, with_projection=options.qk_projection != "none"
            )
            state = state._replace(position=state.position + 1)
        return MemoryProblem(q, k, v, gates, params, options, token_scale, initial_state=state)


class StepConfiguration(NamedTuple):
    """What the binary of a step depends on; the dtypes of a kind of tensors are those of the first memory's.

    dtypes  of q, gates, parameters and states
    sizes   H, D, M
    params  which of `MemoryParams` there are; gates: which of momentum and decay
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, int, int]
    params: tuple[bool, ...]
    gates: tuple[bool, bool]
    options: tuple[MemoryOptions, ...]
    has_active: bool

    @classmethod
    def of(
        cls, q: Tensor, memories: Sequence[StepMemory], stack: MemoryStack, active: Tensor | None
    ) -> StepConfiguration:
        first = memories[0]
        return cls(
            q.device, (q.dtype, first.lr.dtype, first.params.w1.dtype, stack.weights.dtype),
            tuple(first.params.w1.shape), _present(first.params), _present((first.momentum, first.decay)),
            tuple(m.step_options for m in memories), active is not None,
        )  # fmt: skip

    def run(self) -> None:
        from .fused.decode import launch_step

        (H, D, _), (dtype, gate_dtype, params_dtype, state_dtype) = self.sizes, self.dtypes
        q = torch.zeros(1, H, D, dtype=dtype, device=self.device)
        lr = torch.zeros(1, H, dtype=gate_dtype, device=self.device)
        params = _zero_params(self.sizes, self.params, params_dtype, self.device)
        momentum, decay = (lr if there else None for there in self.gates)
        memories, states = [], []
        for options in self.options:
            scale = lr.new_zeros(options.chunk_size) if options.has_token_scale else None
            memories.append(StepMemory(params, lr, *options[:5], momentum=momentum, decay=decay, token_scale=scale))
            projects = options.qk_projection != "none"
            states.append(
                initial_memory_state(
                    params, 1, with_momentum=momentum is not None, with_projection=projects, dtype=state_dtype
                )
            )
        active = torch.ones(1, dtype=torch.bool, device=self.device) if self.has_active else None
        with torch.no_grad():
            launch_step(q, q, q, memories, MemoryStack(states), active)


def _zero_params(
    sizes: tuple[int, int, int], present: tuple[bool, ...], dtype: torch.dtype, device: torch.device
) -> MemoryParams:
    H, D, M = sizes
    shapes = MemoryParams((H, D, M), (H, M), (H, M, D), (H, D), (H, D), (H, D))
    return MemoryParams(
        *(
            torch.zeros(shape, dtype=dtype, device=device) if there else None
            for shape, there in zip(shapes, present, strict=True)
        )
    )


def _present(tensors: tuple[Tensor | None, ...]) -> tuple[bool, ...]:
    return tuple(t is not None for t in tensors)


_failures: dict[tuple, str | None] = {}


def failure(configuration: ReadConfiguration | StepConfiguration) -> str | None:
    """Why the kernels of a configuration cannot run, or None if they can; tried once and remembered.

    While a CUDA graph is captured nothing can be tried: what is not known then counts as running.

    Raises:
        torch.OutOfMemoryError: there is no room for the attempt; it is made again at the next call.
    """
    return _find_failure(type(configuration), tuple(configuration))


@torch.compiler.assume_constant_result
def _find_failure(kind: type[ReadConfiguration] | type[StepConfiguration], fields: tuple) -> str | None:
    """`failure`; torch.compile hands a plain tuple over as it is, but not a named one."""
    key = (kind, fields, torch.get_float32_matmul_precision())
    if key not in _failures:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        # A thread of its own, in which no mode of the caller's holds: checkpointing's hooks, which count what is saved,
        # tracing, autocast, inference mode.
        with ThreadPoolExecutor(1) as thread:
            _failures[key] = thread.submit(_try, kind(*fields)).result()
    return _failures[key]


def _try(configuration: ReadConfiguration | StepConfiguration) -> str | None:
    error = None
    try:
        configuration.run()
    except Exception as caught:  # of any kind: nothing of a user's has gone into this
        if isinstance(caught, torch.OutOfMemoryError) or "out of memory" in str(caught):
            raise
        error = caught
    if configuration.device.type == "cuda":
        # An error of the device itself, from which no backend recovers, is raised again here.
        torch.cuda.synchronize(configuration.device)
    return None if error is None else _explain(error, configuration.device)


def _explain(error: Exception, device: torch.device) -> str:
    import triton

    on = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return (
        f"{_kernel_of(error)} does not compile or launch on {on} with triton {triton.__version__} "
        f"({_first_line(error)}); upgrade torch and its triton, or use backend='torch'"
    )


def _kernel_of(error: BaseException) -> str:
    """The name of the kernel in whose compilation or launch an error was raised."""
    from triton.runtime.jit import KernelInterface

    traceback = error.__traceback__
    while traceback is not None:
        caller = traceback.tb_frame.f_locals.get("self")
        if isinstance(caller, KernelInterface):
            return caller.fn.__name__
        traceback = traceback.tb_next
    return "a kernel"


def _first_line(error: BaseException) -> str:
    """Of the first cause: an error in a helper of a kernel is wrapped once for each call that led there."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)  # without the source that a CompilationError quotes
    return f"{type(error).__name__}: {next(iter(text.strip().splitlines()), '')}"
