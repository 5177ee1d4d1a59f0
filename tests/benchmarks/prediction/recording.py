"""What a call launches: kernels of Triton with grid and sizes, and torch's own kernels, at full size and on a CPU.

Nothing of size is computed: kernels are recorded by `record`, and operations of torch on large tensors only make
results of the right shape, whose memory is never touched. Small ones (tables, positions) are computed, since what is
launched follows from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from recording import Launch, record
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from .ttir import Pointer

COMPUTED = 2**16  # entries of a tensor up to which it is computed
# Operations of torch that launch nothing on a GPU, besides views.
_WITHOUT_KERNEL = frozenset(
    "empty empty_like empty_strided new_empty new_empty_strided lift_fresh detach alias _unsafe_view _reshape_alias "
    "_local_scalar_dense detach_ set_ resize_".split()
)


@dataclass(frozen=True)
class KernelCall:
    """A launch of a Triton kernel. `tuning`: launches of which an autotuner would keep one share a number."""

    launch: Launch
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    operator: str
    tuning: int | None = None


@dataclass(frozen=True)
class TorchCall:
    """A kernel of torch: operations of a product (0 otherwise), bytes of operands and results, the operands' dtype."""

    name: str
    operations: int
    moved: int
    dtype: torch.dtype
    operator: str


@dataclass
class Recording:
    """In order. `operator` of a call is the custom operator that made it, "" outside of all."""

    calls: list[KernelCall | TorchCall] = field(default_factory=list)


@contextlib.contextmanager
def record_calls(target: int, only_operators: bool) -> Iterator[Recording]:
    """Within it, calls are put into the recording and nothing large is computed.

    Args:
        target: compute capability of the GPU to record for, without its point.
        only_operators: leave out torch's own kernels outside of custom operators.
    """
    recording = Recording()
    mode = _Shapes(recording, only_operators)
    with record(target) as launches, _noting_grids(recording, launches, mode), mode:
        yield recording


@contextlib.contextmanager
def _noting_grids(recording: Recording, launches: list[Launch], mode: _Shapes) -> Iterator[None]:
    run_kernel, run_tuned = JITFunction.run, Autotuner.run
    tuning: list[int] = []

    def run(self, *args, grid, warmup, **kwargs):
        before = len(launches)
        result = run_kernel(self, *args, grid=grid, warmup=warmup, **kwargs)
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        sizes = tuple(grid(named) if callable(grid) else grid)
        given = {name: _argument(named.get(name)) for name in self.arg_names}
        for launch in launches[before:]:
            call = KernelCall(launch, (*sizes, 1, 1)[:3], given, mode.operator, tuning[-1] if tuning else None)
            recording.calls.append(call)
        return result

    def run_every_config(self, *args, **kwargs):
        """In place of timing the configurations of an autotuner: all are recorded."""
        tuning.append(len(recording.calls))
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.configs:
            self.fn.run(*args, **(kwargs | config.all_kwargs()))
        self.nargs = None
        tuning.pop()

    JITFunction.run, Autotuner.run = run, run_every_config
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = run_kernel, run_tuned


def _argument(value: Any) -> Any:
    """What is kept of an argument: entries of small tensors of integers, which say how a kernel walks."""
    if not isinstance(value, Tensor):
        return value if isinstance(value, int) else None
    known = value.numel() <= COMPUTED and not value.is_floating_point() and value.is_contiguous()
    return Pointer(value.flatten().tolist() if known else None)


class _Shapes(TorchDispatchMode):
    """Notes torch's kernels, and computes none that is large."""

    def __init__(self, recording: Recording, only_operators: bool):
        super().__init__()
        self.recording, self.only_operators, self.operator = recording, only_operators, ""
        self.widened = WeakIdKeyDictionary()  # of a float32 copy: what it was made of, and the call that made it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in OPDEFS:
            return self._enter(name, args, kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        if func.is_view:
            return func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = _run(func, args, kwargs, inputs)
        self._note(func, inputs, result)
        return result

    def _enter(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The operator's own code, seen by this mode."""
        before, self.operator = self.operator, name
        try:
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        finally:
            self.operator = before

    def _note(self, func, inputs: list[Tensor], result: Any) -> None:
        name = func._schema.name.partition("::")[2]
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if name in _WITHOUT_KERNEL or not results or (self.only_operators and not self.operator):
            return
        operands = self._operands(name, inputs)
        moved = sum(_touched(t) for t in [*operands, *(r for r in results if all(r is not t for t in inputs))])
        dtype = (operands or results)[-1].dtype
        call = TorchCall(name, _operations(name, operands), moved, dtype, self.operator)
        self.recording.calls.append(call)
        if name == "_to_copy" and dtype.itemsize == 2 and results[0].dtype == torch.float32:
            self.widened[results[0]] = (inputs[0], call)

    def _operands(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        """Of a product of two widened operands the narrow ones, and the copies that widened them are struck out.

        CUDA has products with float32 results of narrower operands; elsewhere the operands are widened first.
        """
        pairs = [self.widened.get(t) for t in inputs]
        if name not in ("mm", "bmm") or None in pairs:
            return inputs
        for _, copy in pairs:
            if copy in self.recording.calls:
                self.recording.calls.remove(copy)
        return [narrow for narrow, _ in pairs]


def _run(func, args: tuple, kwargs: dict[str, Any], inputs: list[Tensor]) -> Any:
    """The result of an operation that makes no view; only its shape if it is large."""
    if not inputs:
        return _make(func, args, kwargs)
    if max(t.numel() for t in inputs) <= COMPUTED:
        return func(*args, **kwargs)
    changed = [t for t in _changed(func, args, kwargs) if isinstance(t, Tensor)]
    if changed:
        return changed[0] if len(changed) == 1 else tuple(changed)
    if "device" in {argument.name for argument in func._schema.arguments}:
        kwargs["device"] = torch.device("meta")
    with torch.utils._python_dispatch._disable_current_modes():
        shapes = func(*tree_map(_without_memory, args), **tree_map(_without_memory, kwargs))
        return tree_map(_with_memory, shapes)


def _make(func, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of an operation that makes a tensor of a given size; a large one is left unwritten."""
    sizes = [a for a in args if isinstance(a, list | tuple) and all(isinstance(n, int) for n in a)]
    if not sizes or prod(sizes[0]) <= COMPUTED:
        return func(*args, **kwargs)
    return torch.empty(sizes[0], dtype=kwargs.get("dtype") or torch.get_default_dtype())


def _changed(func, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(kwargs.get(argument.name) if argument.kwarg_only else args[i])
    return found


def _without_memory(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _with_memory(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")


def _touched(tensor: Tensor) -> int:
    """Bytes, of an expanded tensor those that there are."""
    return prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.element_size()


def _operations(name: str, inputs: list[Tensor]) -> int:
    """Of a matrix product, two a multiply-add."""
    if name not in ("mm", "bmm", "addmm", "baddbmm"):
        return 0
    left, right = inputs[-2:]
    return 2 * left.numel() * right.shape[-1]
