"""The correctness gate: only a backend whose output and gradients are right is timed.

Fresh random inputs, in the benchmark's dtype; the reference backend gets the same numbers in float32. Compared is
‖x − reference‖ / ‖reference‖ of the output and of every gradient, each against one limit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modeling_tnt.kernels import MemoryParams

from ..common.costs import BOTH
from ..common.timing import CANNOT_RUN, GATE_FAILED, OK, DeviceLostError, Refused, attempt
from .arguments import KernelBenchArguments
from .contenders import Inputs, draw_inputs, draw_params, memory_options, memory_work

# With every matrix product's operands rounded to bf16, the torch backend is off by 5e-3 at most on these inputs; a
# wrong chunk size, reset or step shows as 0.1 and more. float32 leaves room for tf32, where torch allows it.
LIMITS = {"bf16": 2e-2, "fp16": 5e-3, "fp32": 1e-3}
LEAVES = ("q", "k", "v", "lr", *MemoryParams._fields)
SHORTEST_SHARD = 128


class GateResult(NamedTuple):
    """`status` is "ok", "gate failed" or "cannot run" (`reason` says why); `error` the worst, found at `tensor`."""

    status: str
    error: float | None = None
    tensor: str = ""
    reason: str = ""


class Gate:
    """Checks each backend once per memory type and chunk size, on inputs that all backends share."""

    def __init__(self, args: KernelBenchArguments, generator: torch.Generator):
        self.args, self.generator = args, generator
        self.results: dict[tuple[str, str, int], GateResult] = {}
        self._problems: dict[tuple[str, int], tuple[Inputs, MemoryParams, dict[str, Tensor]]] = {}

    @property
    def limit(self) -> float:
        return LIMITS[self.args.dtype]

    def demand(self, backend: str, memory: str, chunk_size: int) -> None:
        """Raises `Refused` unless the backend is right."""
        result = self.check(backend, memory, chunk_size)
        if result.status != OK:
            raise Refused(result.status, result.reason)

    def check(self, backend: str, memory: str, chunk_size: int) -> GateResult:
        key = (backend, memory, chunk_size)
        if key not in self.results:
            try:
                self.results[key] = self._check(backend, memory, chunk_size)
            except DeviceLostError as error:
                self.results[key] = GateResult(GATE_FAILED, reason=str(error))
                raise
        return self.results[key]

    @property
    def failed(self) -> bool:
        return any(result.status == GATE_FAILED for result in self.results.values())

    def _check(self, backend: str, memory: str, chunk_size: int) -> GateResult:
        outcome = attempt(lambda: self._compare(backend, memory, chunk_size), torch.device(self.args.device))
        if outcome.status == CANNOT_RUN:
            return GateResult(CANNOT_RUN, reason=outcome.reason)
        if outcome.status != OK:
            return GateResult(GATE_FAILED, reason=f"{outcome.status}: {outcome.reason}")
        error, tensor = outcome.value
        if error <= self.limit:  # not so for NaN
            return GateResult(OK, error, tensor)
        reason = f"‖x − reference‖ / ‖reference‖ of {tensor} is {error:.1e}, the limit {self.limit:g}"
        return GateResult(GATE_FAILED, error, tensor, reason)

    def _compare(self, backend: str, memory: str, chunk_size: int) -> tuple[float, str]:
        """The worst error and its tensor."""
        inputs, params, reference = self._problem(memory, chunk_size)
        poison_free_memory([*inputs, *(p for p in params if p is not None)])
        try:
            results = self._run(backend, inputs, params, memory, chunk_size)
        except (ValueError, ImportError) as error:  # the backend does not support the call, or lacks triton
            raise Refused(CANNOT_RUN, str(error)) from error
        return worst_error(results, reference)

    def _run(
        self, backend: str, inputs: Inputs, params: MemoryParams, memory: str, chunk_size: int
    ) -> dict[str, Tensor]:
        options = memory_options(self.args, memory, chunk_size, _gate_shard(self.args, chunk_size))
        work = memory_work(inputs, params, options, backend)
        names = [name for name, x in zip(LEAVES, (*inputs[:4], *params), strict=True) if x is not None]
        results = dict(zip(["output", *names], work.run(BOTH), strict=True))
        for name, leaf in zip(names, work.leaves, strict=True):
            if results[name] is None:
                results[name] = torch.full_like(leaf, torch.nan)
        return results

    def _problem(self, memory: str, chunk_size: int) -> tuple[Inputs, MemoryParams, dict[str, Tensor]]:
        """Inputs in the benchmark's dtype, and what the reference makes of the same numbers in float32."""
        key = (memory, chunk_size)
        if key not in self._problems:
            # A second shard that ends in mid-chunk, so that resets and tails are looked at, too.
            length = _gate_shard(self.args, chunk_size) + chunk_size + max(1, chunk_size // 3)
            inputs = draw_inputs(self.args, 1, length, self.generator)
            params = draw_params(self.args, memory, self.generator)
            wide = Inputs(*(x.detach().float() for x in inputs))
            wide = Inputs(*(x.requires_grad_() for x in wide[:4]), wide.upstream)
            reference = self._run("reference", wide, params, memory, chunk_size)
            self._problems[key] = (inputs, params, reference)
        return self._problems[key]

    def summary(self) -> str:
        """How far the worst result of each backend was from the reference, and what failed."""
        lines = [f"gate: ‖x − reference‖ / ‖reference‖ ≤ {self.limit:g} in {self.args.dtype}, output and gradients"]
        for backend in dict.fromkeys(backend for backend, *_ in self.results):
            mine = {key[1:]: result for key, result in self.results.items() if key[0] == backend}
            passed = [(result.error, result.tensor, key) for key, result in mine.items() if result.status == OK]
            worst = ""
            if passed:
                error, tensor, (memory, chunk_size) = max(passed)
                worst = f", worst {error:.1e} ({tensor} of {memory} C={chunk_size})"
            lines.append(f"  {backend}: {len(passed)} of {len(mine)} memory types and chunk sizes passed{worst}")
            for (memory, chunk_size), result in mine.items():
                if result.status == GATE_FAILED:
                    lines.append(f"  {backend} {memory} C={chunk_size}: {result.status}: {result.reason}")
        return "\n".join(lines)


def worst_error(results: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """The largest ‖x − reference‖ / ‖reference‖ and the name of its tensor; NaN, where there is one, is the largest."""
    worst, where = -1.0, ""
    for name, want in reference.items():
        got = results[name].double()
        error = (torch.linalg.vector_norm(got - want.double()) / torch.linalg.vector_norm(want.double())).item()
        if not error <= worst:
            worst, where = error, name
            if error != error:
                break
    return worst, where


def poison_free_memory(likes: list[Tensor]) -> None:
    """Fill memory with NaN and give it back, so that an output that is not written shows."""
    for like in likes:
        blocks = [torch.full_like(like, torch.nan) for _ in range(4)]
        del blocks


def _gate_shard(args: KernelBenchArguments, chunk_size: int) -> int:
    """Several chunks where they are small, so that states that are kept for groups of chunks are looked at."""
    return chunk_size * max(2, -(-SHORTEST_SHARD // chunk_size))
