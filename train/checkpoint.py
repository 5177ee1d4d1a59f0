"""Files and folders that are either whole or not there: written under another name, then renamed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FILE = "trainer_state.json"
TENSORS_FILE = "trainer_state.safetensors"


def save_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Replace the folder `path` by what `write` puts into an empty one.

    Raises OSError when it cannot be written (a full disk, no permission); what was there is kept then.
    """
    try:
        with atomic_folder(path) as folder:
            write(folder)
    except (OSError, SafetensorError) as error:
        kept = f"the one saved before is kept in {path}" if path.exists() else "nothing was there before it"
        raise OSError(f"{path} could not be saved ({error}); {kept}") from error


def write_state(folder: Path, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The trainer's part of a checkpoint: its state as JSON, the optimizer's tensors as safetensors."""
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / TENSORS_FILE)


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / TENSORS_FILE)


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of Python's, NumPy's and torch's random number generators, as JSON and as tensors."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    tensors = {"rng/torch": torch.get_rng_state(), "rng/numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return {"python": [version, list(numbers), gauss], "numpy": [name, *rest]}, tensors


def restore_random_state(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put back what `random_state` returned. In a run of several processes every one gets the state of the first."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, *rest = state["numpy"]
    np.random.set_state((name, tensors["rng/numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


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
