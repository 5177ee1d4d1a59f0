"""A text file that is either whole or not there: written under another name, then renamed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Put `text` in the place of the file `path`. Raises OSError; what was there is kept then."""
    fresh = path.with_name(f".{path.stem}.saving{path.suffix}")
    try:
        with fresh.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
