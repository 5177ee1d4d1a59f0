"""What a run of measurements knows as it goes on: the time left, whether the device still answers, earlier times."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from ..common.timing import NOT_RUN, Deadline, DeviceLostError, Outcome
from .timing import expected_seconds


class Session:
    """Decides what is still begun. A `series` is what differs from a measurement in its length only."""

    def __init__(self, time_limit: float | None, case_seconds: float):
        self.deadline, self.case_seconds = Deadline(time_limit), case_seconds
        self._lost: str | None = None
        self._last: dict[Hashable, tuple[int, float]] = {}

    def run(self, series: Hashable, length: int, measurement: Callable[[], Outcome]) -> Outcome:
        """The outcome of `measurement`, or that it was not run and why."""
        if self._lost is not None:
            return Outcome(NOT_RUN, self._lost)
        late = self.deadline.refuse(self._expect(series, length))
        if late is not None:
            return Outcome(NOT_RUN, late)
        try:
            return measurement()
        except DeviceLostError as error:
            self._lost = str(error)
            return Outcome(NOT_RUN, self._lost)

    def remember(self, series: Hashable, length: int, seconds: float) -> None:
        """A call of this series took so long; a longer one will take longer at most in proportion."""
        self._last[series] = (length, seconds)

    def _expect(self, series: Hashable, length: int) -> float:
        if series not in self._last:
            return 0.0
        last, seconds = self._last[series]
        return expected_seconds(seconds * max(1.0, length / last), self.case_seconds)
