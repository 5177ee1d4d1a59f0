"""One process or many: how the model is wrapped, and what the processes tell each other.

FSDP2 is applied here rather than by Accelerate, which knows it on accelerators only: the same code runs with gloo on
CPUs, where it is tested, and with NCCL on GPUs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

_SUPPORTED = (
    DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU, DistributedType.FSDP,
)  # fmt: skip

T = TypeVar("T")


class Layout(NamedTuple):
    """How the processes share a step: `data_size` groups each read rows of their own, and this one is in group
    `data_index`. The `context_size` processes of a group follow one another, as in Accelerate's meshes."""

    data_size: int = 1
    data_index: int = 0
    context_size: int = 1

    def name_readers(self, count: int) -> str:
        """What reads rows of its own, in words, for so many of them."""
        if self.context_size == 1:
            return "process" if count == 1 else "processes"
        return f"group{'' if count == 1 else 's'} of {self.context_size} processes"


def find_layout(accelerator: Accelerator, context_parallel: int | None) -> Layout:
    """The layout for a recipe's `training.context_parallel`; None: what Accelerate's ParallelismConfig says, or 1.

    Raises ValueError when the two differ, and when the processes cannot be divided into groups of this size.
    """
    config, processes = accelerator.parallelism_config, accelerator.num_processes
    configured = None if config is None else config.cp_size
    if None not in (context_parallel, configured) and context_parallel != configured:
        raise ValueError(
            f"--training.context-parallel is {context_parallel}, and accelerate's ParallelismConfig has cp_size="
            f"{configured}; give one of them, or the same number"
        )
    size = context_parallel or configured or 1
    if processes % size:
        raise ValueError(
            f"--training.context-parallel {size} must divide the number of processes, {processes}; start "
            f"{size * math.ceil(processes / size)} with accelerate launch --num-processes, or use another number"
        )
    return Layout(processes // size, accelerator.process_index // size, size)


def context_mesh(accelerator: Accelerator, layout: Layout) -> DeviceMesh:
    """The processes of this one's group. Every process must call it."""
    config = accelerator.parallelism_config
    if config is not None and config.cp_enabled:
        return accelerator.torch_device_mesh["cp"]
    # Accelerate makes such a mesh for accelerators with FSDP2 alone; these are its names and its order.
    sizes = (layout.data_size, layout.context_size)
    return init_device_mesh(accelerator.device.type, sizes, mesh_dim_names=("dp_shard", "cp"))["cp"]


def find_wrong_setup(accelerator: Accelerator, sharding: str) -> Iterator[str]:
    """What of Accelerate's configuration cannot be used."""
    yield from _find_wrong_parallelism(accelerator)
    kind = accelerator.distributed_type
    if kind not in _SUPPORTED:
        yield f"accelerate is configured for {kind.value}; use no distribution, MULTI_GPU, MULTI_CPU or FSDP version 2"
    elif kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        yield "accelerate is configured for FSDP version 1; set fsdp_version: 2 in its configuration"
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and accelerator.num_processes == 1:
        # Otherwise each of them would train the whole run by itself, into the same folder.
        yield (
            f"{launched} processes were started, and accelerate takes each for the only one, as it does without a GPU; "
            "set the environment variable ACCELERATE_USE_CPU=true"
        )
    elif sharding == "fsdp2" and accelerator.num_processes == 1:
        yield "--training.sharding fsdp2 needs several processes; start it with accelerate launch --num-processes N"


def _find_wrong_parallelism(accelerator: Accelerator) -> Iterator[str]:
    config = accelerator.parallelism_config
    if config is None:
        return
    for name in ("tp_size", "sp_size"):
        size = getattr(config, name, 1)  # accelerate 1.10 has no sp_size
        if size > 1:
            yield f"accelerate's ParallelismConfig has {name}={size}, which tnt train cannot use; set it to 1"
    if config.dp_replicate_enabled and config.dp_shard_enabled:
        yield (
            f"accelerate's ParallelismConfig has dp_replicate_size={config.dp_replicate_size}, and FSDP2 shards over "
            f"all processes here; use dp_replicate_size=1 and dp_shard_size={config.data_parallel_size}"
        )


def uses_fsdp2(accelerator: Accelerator, sharding: str) -> bool:
    return accelerator.num_processes > 1 and (sharding == "fsdp2" or accelerator.is_fsdp2)


def wrap(model: nn.Module, accelerator: Accelerator, sharding: str) -> nn.Module:
    """The model, which is on its device, for training: itself, in DistributedDataParallel, or sharded in place."""
    if accelerator.num_processes == 1:
        return model
    if not uses_fsdp2(accelerator, sharding):
        on_device = accelerator.device.type != "cpu"
        return DistributedDataParallel(model, device_ids=[accelerator.device.index] if on_device else None)
    offload = accelerator.is_fsdp2 and isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    blocks = set(getattr(model, "_no_split_modules", None) or [])
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, **options)
    return fully_shard(model, **options)


@contextmanager
def without_gradient_sync(wrapped: nn.Module) -> Iterator[None]:
    """Backward passes inside only add to the gradients of their own process."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)
    else:
        with getattr(wrapped, "no_sync", nullcontext)():
            yield


@contextmanager
def unsharded(wrapped: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights of a sharded model, as plain tensors, also after a forward pass."""
    parts = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not wrapped, recurse=False)
            part.reshard()


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to an L2 norm of at most `max_norm` over all of them; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def sum_over_groups(values: list[float], layout: Layout, device: torch.device) -> list[float]:
    """The sum of each value over the groups of processes, in every process. Within a group it is the mean that counts:
    as a rule all processes of a group have the same value."""
    if not _is_distributed():
        return values
    # Metal and some others have no float64; sums of losses and counts need it where it exists.
    total = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    dist.all_reduce(total)
    return (total / layout.context_size).tolist()


def from_main(accelerator: Accelerator | PartialState, action: Callable[[], T]) -> T:
    """What `action` returns in the main process, in every process. Its OSError or ValueError is raised in all."""
    value = failure = None
    if accelerator.is_main_process:
        try:
            value = action()
        except (OSError, ValueError) as error:
            failure = error
    value, failure = broadcast_object_list([value, failure])
    if failure is not None:
        raise failure
    return value


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
