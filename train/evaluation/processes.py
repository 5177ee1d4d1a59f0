"""One process, or several that read each row together (context parallel): who prints and writes, and who reads what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import PreTrainedModel

from modeling_tnt import TNTForCausalLM

from ..loop.distributed import from_main

T = TypeVar("T")


class Processes:
    """The processes of an evaluation. `state` is Accelerate's, or None for the only one."""

    def __init__(self, state: PartialState | None = None):
        self.state = state

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.state is None or self.state.is_main_process

    def main_first(self) -> AbstractContextManager:
        """The main process is inside before the others."""
        return nullcontext() if self.state is None else self.state.main_process_first()

    def from_main(self, action: Callable[[], T]) -> T:
        """What `action` returns in the main process, in every process. Its OSError or ValueError is raised in all."""
        return action() if self.state is None else from_main(self.state, action)

    @contextmanager
    def reading_together(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, each process reads its part of every row. A model other than TNT is read whole by each of them."""
        if self.state is None or not isinstance(model, TNTForCausalLM):
            yield
            return
        model.enable_context_parallel(dist.group.WORLD)
        try:
            yield
        finally:
            model.disable_context_parallel()


def start_processes(context_parallel: int, device: torch.device) -> Processes:
    """Connect the processes that were started, each with its own device.

    Raises:
        ValueError: if Accelerate cannot connect them on this kind of device.
    """
    if context_parallel == 1:
        return Processes()
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes == 1:
        raise ValueError(
            f"--context-parallel {context_parallel}: accelerate cannot connect processes on --device {device}; use "
            "--device cpu, or cuda"
        )
    return Processes(state)
