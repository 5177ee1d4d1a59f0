"""What stops a training run, and what its user is told."""

from __future__ import annotations

import torch
import torch.distributed as dist

from modeling_tnt.context_parallel import ContextParallelError

from ..plan import Run


class NonFiniteError(FloatingPointError):
    """A loss or gradient norm is infinite or not a number."""


class OutOfMemory(RuntimeError):
    """There was too little memory; the message says what to lower."""


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or does not answer; the message says what is left."""


class TrainingStopped(KeyboardInterrupt):
    """A signal asked training to stop; the message says where, and what is left. `signal` is None in a process that
    got none itself."""

    def __init__(self, message: str, signal: int | None):
        super().__init__(message)
        self.signal = signal


# What torch's allocators say where they raise no OutOfMemoryError of their own.
_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was lacking, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _CPU_ALLOCATOR)


def is_lost_process(error: BaseException) -> bool:
    """Whether another process did not answer. What gloo says is a RuntimeError like any other, but for its text."""
    return isinstance(error, ContextParallelError | dist.DistError) or "gloo" in str(error).lower()


def explain_lost_process(error: BaseException) -> str:
    """What is known of it, on one line."""
    if isinstance(error, ContextParallelError):
        return str(error)
    first_line = str(error).strip().partition("\n")[0]
    return (
        f"another process of the run has ended, or does not answer ({first_line}); the first error of all processes is "
        "the cause"
    )


def explain_out_of_memory(error: BaseException, run: Run) -> str:
    """What to lower when memory was lacking."""
    training, advice = run.recipe.training, []
    if run.micro_batch_size > 1:
        advice.append(
            f"--training.micro-batch-size {run.micro_batch_size // 2} (a step stays {training.batch_size} rows)"
        )
    if not training.gradient_checkpointing:
        advice.append("--training.gradient-checkpointing")
    if training.mixed_precision == "no":
        advice.append("--training.mixed-precision bf16")
    if training.sharding == "none":
        advice.append("--training.sharding fsdp2 with several processes")
    if run.layout.context_size == 1 and run.recipe.model.architecture == "tnt":
        advice.append("--training.context-parallel with several processes to a row")
    advice.append(f"a --training.seq-len below {run.block_len}")
    first_line = str(error).strip().partition("\n")[0]
    return f"out of memory ({first_line}). Lower what a step needs: {'; '.join(advice)}"
