"""Stop after the current step on SIGTERM or Ctrl-C."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Stopper:
    """Within its block SIGTERM and the first Ctrl-C only set `signal`; a second Ctrl-C interrupts at once.

    signal: the number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._earlier: dict[int, object] = {}

    def __enter__(self) -> Stopper:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._earlier[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.signal is not None:
                raise KeyboardInterrupt
            print("\nstopping after this step; Ctrl-C again stops at once", flush=True)
        self.signal = number
