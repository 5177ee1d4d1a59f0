"""The memory operations of TNT: tensors and ints only, nothing of the model."""

if __name__ == "kernels":  # not as modeling_tnt.kernels: see _bare_name
    from ._bare_name import step_aside

    step_aside()
else:
    from .api import global_memory, local_memory
    from .backends import BACKENDS, BackendChoice, choose_backend
    from .memories.kinds import memory_types, register_memory
    from .stack import MemoryStack
    from .step import StepMemory, choose_step_backend, step_memories
    from .types import FastWeights, MemoryParams, MemoryState, initial_memory_state

__all__ = [
    "BACKENDS",
    "BackendChoice",
    "FastWeights",
    "MemoryParams",
    "MemoryStack",
    "MemoryState",
    "StepMemory",
    "choose_backend",
    "choose_step_backend",
    "global_memory",
    "initial_memory_state",
    "local_memory",
    "memory_types",
    "register_memory",
    "step_memories",
]
