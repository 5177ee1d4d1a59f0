"""Files and folders that are either whole or not there: written under another name, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

ASIDE = ("saving", "previous", "removing")


def save_folder(path: Path, write: Callable[[Path], None], own: Collection[str] = ()) -> None:
    """Replace the folder `path` by what `write` puts into an empty one; `own` as for `atomic_folder`.

    Raises OSError when it cannot be written (a full disk, no permission); what was there is kept then.
    """
    try:
        with atomic_folder(path, own) as folder:
            write(folder)
    except (OSError, SafetensorError) as error:
        kept = f"the one saved before is kept in {path}" if path.exists() else "nothing was there before it"
        raise OSError(f"{path} could not be saved ({error}); {kept}") from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether there was no room, or a quota was used up, for what `save_folder` wrote."""
    if error is None or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return error is not None
    return f"os error {errno.ENOSPC}" in str(error) or is_disk_full(error.__cause__)  # as safetensors says it


@contextmanager
def atomic_folder(path: Path, own: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `path` and, when the block succeeds, put it in the place of `path`.

    At every moment a complete folder is on the disk: the old one is renamed to `.<name>.previous`, the new one takes
    its name, and only then is the old one removed. A process killed between the two renames leaves the old one under
    that name: `recover` brings it back.

    Args:
        own: files of the old folder, as paths from it, that are removed with it. Others go over to the new one, but for
            those that it has itself.
    """
    fresh, previous, _ = neighbours(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path, own)
    fresh.mkdir()
    try:
        yield fresh
        _settle(fresh)
        if path.exists():
            os.rename(path, previous)
        os.rename(fresh, path)
    except BaseException:
        if previous.exists() and not path.exists():
            os.rename(previous, path)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    discard(previous, path, own)


def recover(path: Path, own: Collection[str] = ()) -> None:
    """Undo what a process killed while it saved or removed `path` left behind: nothing, or a half-written folder, or a
    complete one that had been renamed to make room, or one that was being removed. `own` as for `atomic_folder`."""
    fresh, previous, removing = neighbours(path)
    if previous.exists() and not path.exists():
        os.rename(previous, path)
    shutil.rmtree(fresh, ignore_errors=True)
    for aside in (previous, removing):
        discard(aside, path, own)


def discard(aside: Path, path: Path, own: Collection[str]) -> None:
    """Remove the folder `path`, which was renamed to `aside`: the files named in `own`, and those that are in `path`
    again. Others go back to `path`. What cannot be removed stays for `recover`."""
    with suppress(OSError):
        for file in list(files_below(aside)):
            name = file.relative_to(aside)
            if name.as_posix() in own or os.path.lexists(path / name):
                file.unlink()
            else:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                os.rename(file, path / name)
        shutil.rmtree(aside, ignore_errors=True)


def files_below(path: Path) -> Iterator[Path]:
    """The file `path`, or all files in the folder `path` and its subfolders; links are files, and are not followed."""
    if path.is_symlink() or path.is_file():
        yield path
        return
    for place, folders, files in os.walk(path):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (Path(place, name) for name in [*files, *links])


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


def neighbours(path: Path) -> tuple[Path, Path, Path]:
    """Where a folder is while it is written, replaced and removed."""
    saving, previous, removing = (path.with_name(f".{path.name}.{suffix}") for suffix in ASIDE)
    return saving, previous, removing


def _settle(folder: Path) -> None:
    """Give files the permissions that new ones have here, which safetensors does not, and wait until they are on the
    disk: a rename may otherwise reach it before what it names."""
    for path in files_below(folder):
        path.chmod(folder.stat().st_mode & 0o666)
        with path.open("rb") as file:
            os.fsync(file.fileno())
