"""Measurements that may fail or come too late: what came of one, in a word and a reason, and the time that is left."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

OK = "ok"
MISSING = "missing"  # not installed, or not made for this device
CANNOT_RUN = "cannot run"  # ours: says that it does not support the case
GATE_FAILED = "gate failed"
OUT_OF_MEMORY = "out of memory"
FAILED = "failed"
NOT_RUN = "not run"


class Refused(Exception):
    """A measurement that is not made: the status that it gets, and the reason."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status


class DeviceLostError(RuntimeError):
    """After an error the device answers no more: nothing else can be measured in this process."""


class Outcome(NamedTuple):
    """`value` is there if and only if `status` is "ok"; otherwise `reason` says why not."""

    status: str
    reason: str = ""
    value: Any = None


class Deadline:
    """The time limit of a run, in seconds from now; None: no limit."""

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self.began = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def refuse(self, expected: float = 0.0) -> str | None:
        """Why something that takes `expected` seconds is not begun any more, or None if it may."""
        if self.seconds is None or self.elapsed + expected < self.seconds:
            return None
        if self.elapsed >= self.seconds:
            return f"time limit of {self.seconds:g} s"
        left = self.seconds - self.elapsed
        return f"time limit of {self.seconds:g} s: would take about {expected:.0f} s, {left:.0f} s are left"


def attempt(fn: Callable[[], Any], device: torch.device) -> Outcome:
    """Call `fn`; an exception becomes an outcome.

    Raises:
        DeviceLostError: when `fn` failed in a way that the device does not survive, such as an illegal memory access.
    """
    try:
        outcome = Outcome(OK, value=fn())
    except DeviceLostError:
        raise
    except Refused as error:
        outcome = Outcome(error.status, " ".join(str(error).split()))
    except (torch.OutOfMemoryError, MemoryError) as error:
        outcome = Outcome(OUT_OF_MEMORY, _first_line(error))
    except Exception as error:  # whatever other people's code raises is a result, not the end of the run
        out_of_memory = "can't allocate memory" in str(error) or "out of memory" in str(error)
        outcome = Outcome(OUT_OF_MEMORY if out_of_memory else FAILED, f"{type(error).__name__}: {_first_line(error)}")
    # The exception is gone and with it the frames that held tensors.
    free_memory(device)
    if outcome.status != OK:
        _check_alive(device, outcome.reason)
    return outcome


def free_memory(device: torch.device) -> None:
    """Give a GPU's memory back that the last contender left, so that the next one starts like the first."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_alive(device: torch.device, reason: str) -> None:
    try:
        torch.ones(2, device=device).sum().item()
    except RuntimeError as error:
        raise DeviceLostError(f"the device answers no more after this: {reason}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
