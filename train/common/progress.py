"""How far something has come: a bar on a terminal, plain lines in a log file or a pipe."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 20.0  # between two lines where there is no terminal


class _Lines(tqdm):
    """A whole line every so often, and one at the end, in place of a bar that is drawn over itself."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None and self.n > self.initial:
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """There is nothing to draw over."""

    def close(self) -> None:
        if not self.disable and self.leave and self.n > self.last_print_n:
            self.display()
        self.leave = False
        super().close()


def progress_bar(
    total: int | None, name: str, unit: str, *, leave: bool = True, initial: int = 0, active: bool = True, **more: Any
) -> tqdm:
    """A progress bar on stderr; `more` goes to tqdm."""
    shared = {"total": total, "desc": name, "unit": unit, "leave": leave, "initial": initial, "disable": not active}
    if sys.stderr.isatty():
        return tqdm(**shared, mininterval=0.2, dynamic_ncols=True, **more)
    return _Lines(**shared, mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS, ncols=0, **more)
