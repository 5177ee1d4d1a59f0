"""What is predicted: the memories of presets in training, and the operations that `tnt bench kernels --quick` times."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from recording import DTYPES, SHARED_LIMITS

from modeling_tnt import TNTConfig
from modeling_tnt.kernels.fused.limits import assume_device
from modeling_tnt.memory_layer import TNTMemoryLayer
from modeling_tnt.train.bench.arguments import KernelBenchArguments
from modeling_tnt.train.bench.contenders import Case, FlaTttLinear, OurMemory
from modeling_tnt.train.common.costs import BOTH, FORWARD, attention_operations, memory_operations

from .card import H100
from .recording import Recording, record_calls

DTYPE = "bf16"
TOKENS, LENGTH = 65536, 32768
NARROW = 32  # hidden width of a recorded layer: its memories do not depend on it


@dataclass(frozen=True)
class LayerCase:
    """A training step of a preset's memories, with one local memory of this chunk size.

    shard_length: tokens after which the local memory is reset; 0: as the preset has it.
    """

    preset: str
    chunk_size: int
    shard_length: int = 0

    @property
    def name(self) -> str:
        return self.preset + (f", shards of {self.shard_length}" if self.shard_length else "")

    @property
    def config(self) -> TNTConfig:
        shard = {"local_shard_lengths": self.shard_length} if self.shard_length else {}
        return TNTConfig.from_preset(
            self.preset, kernel_backend="triton", hidden_size=NARROW, local_chunk_sizes=[self.chunk_size], **shard
        )

    def record(self, target: int) -> Recording:
        """Forward and backward under autocast. Raises ValueError if the kernels do not run it."""
        layer = TNTMemoryLayer(self.config)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(0.01)  # much of it is made by torch.empty
        with _device(target), record_calls(target, only_operators=True) as recording:
            x = torch.zeros(TOKENS // LENGTH, LENGTH, NARROW, requires_grad=True)
            with torch.autocast("cpu", DTYPES[DTYPE]):
                o = layer(x)
            o.backward(torch.zeros_like(o))
        return recording

    def operations(self) -> int:
        """Of the products of all memories, forward and backward, as `common.costs` counts them."""
        config = self.config
        shape = {"memory": config.memory_type, "head_dim": config.head_dim, "expansion": config.memory_expansion}
        each = memory_operations(BOTH, chunk_size=self.chunk_size, qk_projection=config.qk_projection, **shape)
        if config.global_chunk_size is not None:
            each += memory_operations(BOTH, chunk_size=0, qk_projection="none", **shape)
        return each * TOKENS * config.num_heads

    def attention_operations(self) -> int:
        """Of causal attention with the same heads over the same tokens."""
        config = self.config
        return attention_operations(BOTH, head_dim=config.head_dim, length=LENGTH) * TOKENS * config.num_heads


@dataclass(frozen=True)
class OperationCase:
    """A call that `tnt bench kernels --quick` times on a GPU: its contender, at its sizes."""

    contender: str
    memory: str
    chunk_size: int
    mode: str

    @property
    def arguments(self) -> KernelBenchArguments:
        return KernelBenchArguments(
            device="cpu", dtype=DTYPE, heads=12, shard_length=2048, tokens=131072, lengths=[LENGTH],
            chunk_sizes=[self.chunk_size], seed=0, output_dir=Path(),
        )  # fmt: skip

    def record(self, target: int) -> Recording:
        """Raises ValueError if the kernels do not run it, ImportError if its package is not there."""
        maker = FlaTttLinear() if self.contender == "fla" else OurMemory(self.contender)
        if self.contender == "fla":
            import_fla()
        case = Case(self.contender, self.memory, self.chunk_size, LENGTH, self.mode)
        with _device(target), record_calls(target, only_operators=False) as recording:
            triton.runtime.driver.active.utils = _Properties()
            work = maker.prepare(case, self.arguments, torch.Generator())
            recording.calls.clear()  # those that draw the inputs
            if self.mode == FORWARD:
                with torch.no_grad():
                    work.forward()
            else:
                o = work.forward()
                torch.autograd.grad(o, work.leaves, work.upstream.to(o.dtype), allow_unused=True)
        return recording


class _Properties:
    """What the recorder's stand-in for a GPU answers to a package that asks for its size."""

    def get_device_properties(self, device: int | None) -> dict[str, int]:
        return {"multiprocessor_count": H100.multiprocessors, "max_shared_mem": SHARED_LIMITS[H100.target]}


def import_fla() -> None:
    """Before a recorder stands in for a GPU: the package looks for one while it is imported. Raises ImportError."""
    importlib.import_module("fla.ops.ttt")


def _device(target: int):
    return assume_device(divmod(target, 10), SHARED_LIMITS[target])


LAYERS = (
    *(LayerCase("tnt-150m", chunk) for chunk in (8, 16, 64)),
    *(LayerCase("titans-150m", chunk) for chunk in (8, 16, 64)),
    *(LayerCase("ttt-mlp-125m", chunk) for chunk in (16, 64)),
    *(LayerCase("ttt-linear-125m", chunk) for chunk in (16, 64)),
)
OPERATIONS = tuple(
    OperationCase(contender, memory, chunk_size, mode)
    for contender, memory in (("triton", "mlp"), ("triton", "linear"), ("fla", "linear"))
    for chunk_size in (16, 8)
    for mode in (BOTH, FORWARD)
)


def try_recording(record: Callable[[], Recording]) -> tuple[Recording | None, str]:
    """The recording, or None and in a sentence why there is none."""
    try:
        return record(), ""
    except (ValueError, ImportError) as error:
        return None, " ".join(str(error).split())
