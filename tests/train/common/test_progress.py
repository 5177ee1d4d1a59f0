"""Progress in a log file: whole lines, not a bar that is drawn over itself."""

from __future__ import annotations

import io
import sys

import pytest

from modeling_tnt.train.common import progress


def _show(steps: int) -> None:
    with progress.progress_bar(steps, "stage1", "step") as outer:
        for _ in range(steps):
            outer.set_postfix_str("3.100 bits/byte", refresh=False)
            outer.update()
            with progress.progress_bar(2, "validation", "row", leave=False) as inner:
                inner.update(2)


@pytest.mark.parametrize("seconds, count", [(20.0, 1), (0.0, 5)])
def test_a_log_file_gets_whole_lines_and_few_of_them(monkeypatch: pytest.MonkeyPatch, seconds: float, count: int):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    monkeypatch.setattr(progress, "LINE_SECONDS", seconds)
    _show(5)
    lines = stream.getvalue().splitlines()
    assert sum(line.startswith("stage1: ") for line in lines) == count
    assert sum(line.startswith("validation: 100% 2/2 ") for line in lines) == (5 if count == 5 else 0)
    assert lines[-1].startswith("stage1: 100% 5/5 ") or count == 5
    assert "3.100 bits/byte]" in stream.getvalue() and not set("\r\x1b") & set(stream.getvalue())


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    _show(3)
    assert "\r" in stream.getvalue() and "3/3" in stream.getvalue()
