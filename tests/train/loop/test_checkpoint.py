"""A checkpoint is whole or not there, and the one before it survives whatever interrupts its replacement."""

from __future__ import annotations

import errno
import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modeling_tnt.train.common.files import atomic_file, atomic_folder, recover, save_folder
from modeling_tnt.train.loop.checkpoint import (
    CHECKSUMS_FILE,
    STATE_FILE,
    TENSORS_FILE,
    find_damage,
    random_state,
    read_state,
    read_tensors,
    restore_random_state,
    write_checksums,
    write_state,
)


def _write(folder: Path, text: str) -> None:
    (folder / "weights").write_text(text)


def _only(path: Path) -> bool:
    """Whether nothing but `path` is in its folder: no leftovers."""
    return [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder that holds "old"."""
    path = tmp_path / "stage1"
    with atomic_folder(path) as folder:
        _write(folder, "old")
    return path


def test_a_folder_replaces_the_one_before(saved: Path):
    with atomic_folder(saved) as folder:
        _write(folder, "new")
        assert (saved / "weights").read_text() == "old"
    assert (saved / "weights").read_text() == "new" and _only(saved)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_a_failure_while_writing_keeps_the_old_folder(saved: Path, error: BaseException):
    with pytest.raises(type(error)), atomic_folder(saved) as folder:
        _write(folder, "half of")
        raise error
    assert (saved / "weights").read_text() == "old" and _only(saved)


@pytest.mark.parametrize("failing_rename", [1, 2])
def test_a_failure_of_either_rename_keeps_the_old_folder(saved: Path, monkeypatch, failing_rename: int):
    calls, rename = [], os.rename

    def fail_once(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing_rename:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(saved) as folder:
        _write(folder, "new")
    assert (saved / "weights").read_text() == "old" and _only(saved)


@pytest.mark.parametrize("moment", ["writing", "flushed", "moved aside", "in place"])
def test_a_process_killed_at_any_moment_leaves_a_whole_folder(saved: Path, monkeypatch, moment: str):
    """The process is killed for real: a fork that exits without any clean-up."""
    pid = os.fork()
    if pid == 0:
        rename, renames = os.rename, []

        def die_behind_rename(source: Path, target: Path) -> None:
            if moment == "flushed":
                os._exit(1)
            rename(source, target)
            renames.append(source)
            if moment == ("moved aside", "in place")[len(renames) - 1]:
                os._exit(1)

        os.rename = die_behind_rename
        with atomic_folder(saved) as folder:
            _write(folder, "new")
            if moment == "writing":
                os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    recover(saved)
    assert (saved / "weights").read_text() == ("new" if moment == "in place" else "old") and _only(saved)


def test_a_failure_while_writing_a_file_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "metrics.json"
    with atomic_file(path) as fresh:
        fresh.write_text("old")
    with pytest.raises(OSError), atomic_file(path) as fresh:
        fresh.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old" and _only(path)


def test_a_disk_that_is_full_is_an_oserror_and_keeps_the_old_folder(tmp_path: Path):
    """The system refuses to write more than 20 kB to a file, in the middle of the tensors."""
    path = tmp_path / "stage1"

    def write(value: float):
        return lambda folder: save_file({"weight": torch.full((10_000,), value)}, folder / "model.safetensors")

    save_folder(path, write(1.0))
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"stage1 could not be saved .*; the one saved before is kept in {path}"):
            save_folder(path, write(2.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before and _only(path)


def test_random_numbers_go_on_where_they_were_saved(tmp_path: Path):
    def draw() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    draw()
    state, tensors = random_state()
    write_state(tmp_path, {"random": state}, tensors)
    expected = draw()
    restore_random_state(read_state(tmp_path)["random"], read_tensors(tmp_path))
    assert draw() == expected


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The files of a checkpoint, with small weights."""
    save_file({"weight": torch.zeros(100)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    write_state(tmp_path, {"state": {}, "seconds": 0.0, "random": {}}, {"rng": torch.zeros(100)})
    write_checksums(tmp_path)
    return tmp_path


def _flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]), "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}  # fmt: skip


@pytest.mark.parametrize("checksums", [True, False], ids=["with checksums", "of an earlier version"])
@pytest.mark.parametrize("name", [STATE_FILE, TENSORS_FILE, "model.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_found_and_its_file_named(checkpoint: Path, damage: str, name: str, checksums: bool):
    if not checksums:
        (checkpoint / CHECKSUMS_FILE).unlink()
    assert find_damage(checkpoint) is None
    DAMAGES[damage](checkpoint / name)
    found = find_damage(checkpoint)
    assert found and (name in found or "weights are missing" in found), found


@pytest.mark.parametrize("name", [STATE_FILE, TENSORS_FILE, "model.safetensors", "config.json"])
def test_a_flipped_bit_is_found(checkpoint: Path, name: str):
    _flip(checkpoint / name)
    assert name in find_damage(checkpoint)


def test_a_checkpoint_without_its_config_is_damaged(checkpoint: Path):
    (checkpoint / "config.json").unlink()
    assert find_damage(checkpoint) == "config.json is missing"


def test_checksums_that_were_cut_off_are_no_proof(checkpoint: Path):
    DAMAGES["emptied"](checkpoint / CHECKSUMS_FILE)
    assert CHECKSUMS_FILE in find_damage(checkpoint)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_weights_get_the_permissions_of_other_new_files(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        save_folder(tmp_path / "a", lambda folder: save_file({"x": torch.zeros(1)}, folder / "model.safetensors"))
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
