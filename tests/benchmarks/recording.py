"""What Triton would compile for the kernels that the presets launch, written down without a GPU.

The memory layer of each preset runs on CPU tensors: a training step, one with long chunks, a prompt read in two calls,
a token of decoding. A recorder stands where a kernel would be compiled and launched and writes down what Triton's own
binder made of the arguments: nothing about a launch is written a second time here, and what is compiled is what a GPU
would compile.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from modeling_tnt import TNTConfig
from modeling_tnt.cache import TNTCacheLayer
from modeling_tnt.configuration import available_presets
from modeling_tnt.kernels.fused.limits import assume_device
from modeling_tnt.memory_layer import TNTMemoryLayer, step_options
from modeling_tnt.packing import TokenStep

# Bytes of shared memory that one block may have, by compute capability without its point (CUDA programming guide).
SHARED_LIMITS = {
    80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024,
    100: 227 * 1024, 103: 227 * 1024, 110: 227 * 1024, 120: 99 * 1024, 121: 99 * 1024,
}  # fmt: skip
TARGETS = (80, 90, 100)  # those of the table

# How an error of the backend begins that is no mistake but its rule: too large a state for these operands.
REFUSAL = "backend='triton' cannot run:"

LONG_CHUNK = 64  # tokens
# Those of memories alone: beside attention they run the same kernels, but for the global memory of Titans' MAC, with
# momentum and forget gate, which the table does not have yet.
PRESETS = [name for name in available_presets() if not TNTConfig.from_preset(name).has_attention]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Launch:
    """What Triton would compile for one launch: `triton.compile(ASTSource(...), target, options)`.

    signature  name of each parameter → its type, e.g. "*bf16", "i32", or "constexpr" (an int that is 1 and None, too).
    constants  path of a constant among the parameters, (index,) for one that is no tuple → its value.
    attributes path of an argument → its attributes; an address or an int that 16 divides has one.
    """

    kernel: JITFunction
    target: int
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @functools.cached_property
    def key(self) -> str:
        """Equal for launches that share a binary."""
        parts = (self.signature, self.constants, self.attributes, self.options.__dict__)
        return f"{self.kernel.module}.{self.name} {self.target} {parts}"

    def constexprs(self) -> dict[str, str]:
        """The constants by the name of their parameter, as text."""
        names = self.kernel.arg_names
        return {
            ".".join([names[path[0]], *map(str, path[1:])]): _constant_text(value)
            for path, value in self.constants.items()
        }

    def types(self) -> dict[str, str]:
        """The types of the other arguments, with "/16" for what is known to be a multiple of 16."""
        names = self.kernel.arg_names
        aligned = {names[path[0]] for path, attributes in self.attributes.items() if attributes}
        kinds = {name: kind for name, kind in self.signature.items() if kind != "constexpr"}
        return {name: f"{kind}/16" if name in aligned else str(kind) for name, kind in kinds.items()}


def _constant_text(value: Any) -> str:
    return value.__name__ if isinstance(value, JITFunction) else str(value)


class _TargetDriver:
    """Stands for a GPU of which only the compute capability is known."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target  # a kernel keeps a binder per device, so each target is a device of its own

    def get_current_stream(self, device: int) -> int:
        return 0


def check_triton() -> None:
    """Raise RuntimeError where Triton is too old: before 3.6 it compiles and launches in one function."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        raise RuntimeError(f"this needs triton 3.6 or newer, found {triton.__version__}; pip install 'triton>=3.6'")


@contextlib.contextmanager
def record(target: int) -> Iterator[list[Launch]]:
    """Within it, launches of Triton kernels are put into the list, in order, and do nothing else.

    Args:
        target: compute capability of the GPU to bind arguments for, without its point.
    """
    check_triton()
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels of the interpreter cannot be compiled; unset it")
    launches: list[Launch] = []

    def note(kernel, key, signature, device, constants, options, attributes, warmup):
        """In place of `JITFunction._do_compile`; without a binary, `run` returns before it would launch."""
        launches.append(Launch(kernel, target, signature, constants, attributes, options))

    driver, compile_kernel = triton.runtime.driver, JITFunction._do_compile
    before = driver._active
    driver.set_active(_TargetDriver(target))
    JITFunction._do_compile = note
    try:
        yield launches
    finally:
        JITFunction._do_compile = compile_kernel
        driver._active = before


# -- What is recorded: the memory layers of the presets ----------------------------------------------------------------


@dataclass
class Case:
    """A binary that is needed, and by what: (preset, dtype, phase), each of which may need it."""

    launch: Launch
    users: set[tuple[str, str, str]] = field(default_factory=set)


def collect(
    presets: Iterable[str], dtypes: Iterable[str], targets: Iterable[int], phases: Iterable[str] | None = None
) -> tuple[list[Case], list[str]]:
    """The distinct binaries that training and decoding need, and a line for each phase that the kernels do not run by
    their own rule, with the reason.
    """
    cases: dict[str, Case] = {}
    refused: dict[str, list[str]] = {}
    for target in targets:
        for preset in presets:
            for dtype in dtypes:
                for phase in PHASES if phases is None else phases:
                    launches, reason = _record_phase(PHASES[phase], preset, DTYPES[dtype], target)
                    for launch in launches:
                        cases.setdefault(launch.key, Case(launch)).users.add((preset, dtype, phase))
                    if reason is not None:
                        refused.setdefault(f"{preset}, {dtype}, {phase}: {reason}", []).append(f"sm_{target}")
    return list(cases.values()), [f"{', '.join(found)}: {text}" for text, found in refused.items()]


def _record_phase(drive: Callable, preset: str, dtype: torch.dtype, target: int) -> tuple[list[Launch], str | None]:
    """The launches of a phase, and why it ended before its end, if the backend said that it cannot run it."""
    with record(target) as launches, assume_device(divmod(target, 10), SHARED_LIMITS[target]):
        try:
            drive(preset, dtype)
        except ValueError as error:
            if not str(error).startswith(REFUSAL):
                raise
            return launches, str(error).removeprefix(REFUSAL).strip()
    return launches, None


def _make_layer(preset: str, **changes: Any) -> TNTMemoryLayer:
    """A layer as the preset has it, but as narrow as its input: what the memories see does not depend on that."""
    config = TNTConfig.from_preset(preset, kernel_backend="triton", hidden_size=32, **changes)
    layer = TNTMemoryLayer(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.01)  # much of it is made by torch.empty
    return layer


def _tokens(layer: TNTMemoryLayer) -> int:
    """A length at which every memory learns in one chunk, or shard, and reads in the next."""
    config = layer.config
    spans = [config.global_chunk_size, *config.local_chunk_sizes, *config.shard_lengths]
    return max(256, *(span for span in spans if span is not None)) + 16


def _train(preset: str, dtype: torch.dtype) -> None:
    _train_layer(_make_layer(preset), dtype)


def _train_long_chunks(preset: str, dtype: torch.dtype) -> None:
    """With chunks of several tiles, as in a first stage of training: their anchors are kept apart."""
    sizes = TNTConfig.from_preset(preset).local_chunk_sizes
    _train_layer(_make_layer(preset, local_chunk_sizes=[LONG_CHUNK] * len(sizes)), dtype)


def _train_layer(layer: TNTMemoryLayer, dtype: torch.dtype) -> None:
    """Weights in float32, as the trainer holds them; bf16 is autocast."""
    x = torch.zeros(2, _tokens(layer), layer.config.hidden_size, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        o = layer(x)
    o.backward(torch.zeros_like(o))


def _prefill(preset: str, dtype: torch.dtype) -> None:
    """A prompt in two calls, cut in mid-chunk, with the weights in `dtype`."""
    layer, cache = _make_layer(preset).to(dtype), TNTCacheLayer()
    with torch.no_grad():
        for length in (_tokens(layer) + 3, _tokens(layer)):
            x = torch.zeros(2, length, layer.config.hidden_size, dtype=dtype)
            layer(x, cache_layer=cache, update_cache=True)


def _decode(preset: str, dtype: torch.dtype) -> None:
    """A token of every row, and of some rows, with the weights in `dtype`."""
    layer, cache = _make_layer(preset).to(dtype), TNTCacheLayer()
    x = torch.zeros(2, 1, layer.config.hidden_size, dtype=dtype)
    with torch.no_grad():
        for active in (None, torch.tensor([True, False])):
            layer(x, cache_layer=cache, step=TokenStep(active, "triton", step_options(layer.config)))


PHASES: dict[str, Callable[[str, torch.dtype], None]] = {
    "train": _train,
    "train long chunks": _train_long_chunks,
    "prefill": _prefill,
    "decode": _decode,
}
