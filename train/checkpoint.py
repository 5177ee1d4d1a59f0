"""Files and folders that are either whole or not there: written under another name, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

STATE_FILE = "trainer_state.json"


def save_checkpoint(path: Path, model: Any, tokenizer: Any, state: dict[str, Any]) -> None:
    """Replace the checkpoint folder `path` by one of the model (safetensors), its tokenizer and the trainer's state.

    Raises OSError when it cannot be written (a full disk, no permission); the checkpoint that was there is kept then.
    """
    try:
        with atomic_folder(path) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        kept = f"the one saved before is kept in {path}" if path.exists() else "there was none before it"
        raise OSError(f"the checkpoint {path} could not be saved ({error}); {kept}") from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` and, when the block succeeds, put it in the place of `path`.

    At every moment a complete folder is on the disk: the old one is renamed to `.<name>.previous`, the new one takes
    its name, and only then is the old one removed. A process killed between the two renames leaves the old one under
    that name: `recover` brings it back.
    """
    fresh, previous = _neighbours(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    fresh.mkdir()
    try:
        yield fresh
        _flush_to_disk(fresh)
        if path.exists():
            os.rename(path, previous)
        os.rename(fresh, path)
    except BaseException:
        if previous.exists() and not path.exists():
            os.rename(previous, path)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def recover(path: Path) -> None:
    """Undo what a process killed while it saved `path` left behind: nothing, or a half-written folder, or a complete
    one that had been renamed to make room."""
    fresh, previous = _neighbours(path)
    if previous.exists() and not path.exists():
        os.rename(previous, path)
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to and, when the block succeeds, put that file in the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays: some writers choose the format by it.
    fresh = path.with_name(f".{path.stem}.saving{path.suffix}")
    try:
        yield fresh
        os.replace(fresh, path)
    except BaseException:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def _neighbours(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.saving"), path.with_name(f".{path.name}.previous")


def _flush_to_disk(folder: Path) -> None:
    """Wait until the files are on the disk: a rename may otherwise reach it before what it names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
