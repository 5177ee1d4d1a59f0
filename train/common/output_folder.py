"""An output folder: what a command of this package wrote there, and whether a process is writing there now.

`tnt-manifest.json` lists for each command its files, as paths from the folder, and with a slash at the end the folders
that it makes. What it does not list is the user's, and is never replaced or removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from modeling_tnt.hub_cards import CARD_FILE, is_own_card
from modeling_tnt.hub_cards.facts import FACTS_FILE

from .files import ASIDE, atomic_file, discard, files_below, neighbours, recover, save_folder

MANIFEST, LOCK = "tnt-manifest.json", ".tnt.lock"
SHOWN = 4  # files that a message names


class OutputFolder:
    """The folder `root` as `command` (`train`, `eval`, ...) may use it."""

    def __init__(self, root: Path, command: str):
        self.root, self.command = root, command

    # -------------------------------------------------------------------------------------------------------- manifest

    def listed(self) -> set[str]:
        """Files and folders of this command. Raises ValueError for a manifest that is damaged or somebody else's."""
        return set(self._read_manifest().get(self.command, []))

    def _read_manifest(self) -> dict[str, list[str]]:
        path = self.root / MANIFEST
        if not os.path.lexists(path):
            return {}
        try:
            written = json.loads(path.read_text(encoding="utf-8"))["written_by"]
            names = [PurePosixPath(name) for listed in written.values() for name in listed]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); give another folder, or move its files away") from error
        outside = [str(name) for name in names if name.is_absolute() or ".." in name.parts]
        if outside:
            raise ValueError(f"{path} lists {outside[0]!r}, which is not in its folder; give another folder")
        return written

    def claim(self, names: Iterable[str], *, dropped: Iterable[str] = ()) -> None:
        """List what is about to be written; drop what was removed."""
        written = self._read_manifest()
        listed = set(written.get(self.command, []))
        changed = (listed - set(dropped)) | set(names)
        if changed == listed:
            return
        written[self.command] = sorted(changed)
        if not any(written.values()):
            (self.root / MANIFEST).unlink()
            return
        with atomic_file(self.root / MANIFEST) as path:
            path.write_text(json.dumps({"written_by": written}, indent=0) + "\n", encoding="utf-8")

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _is_own(self, path: Path, listed: set[str]) -> bool:
        """Whether a file is listed, not reached through a link, and no model card that somebody edited."""
        inside = [path, *(p for p in path.parents if p.is_relative_to(self.root) and p != self.root)]
        if self._name(path) not in listed or any(p.is_symlink() for p in inside):
            return False
        return path.name != CARD_FILE or not (path.parent / FACTS_FILE).exists() or is_own_card(path)

    def _own_below(self, folder: Path) -> set[str]:
        """The command's own files below a folder, as paths from it."""
        listed = self.listed()
        return {p.relative_to(folder).as_posix() for p in files_below(folder) if self._is_own(p, listed)}

    # ---------------------------------------------------------------------------------------------------------- checks

    def find_problems(self, names: Iterable[str], *, flag: str = "--output-dir", overwrite: bool) -> Iterator[str]:
        """What of a user's, or of an earlier use of the command, is where `names` would be written.

        Args:
            names: files, and folders with a slash at the end.
            overwrite: what the command itself wrote may be replaced.

        Raises ValueError for a manifest that cannot be read.
        """
        listed, names = self.listed(), list(names)
        own: list[str] = []
        others: list[str] = []
        for path in self._files_at(names, listed):
            (own if self._is_own(path, listed) else others).append(self._name(path))
            if len(others) > SHOWN:
                break
        if others:
            yield (
                f"{flag} {self.root} holds {_words(others)} under names that tnt {self.command} writes. {MANIFEST} "
                "there does not list them, or they were edited, so they stay: move them away, or give another folder"
            )
        elif own and not overwrite:
            yield f"{flag} {self.root} holds {_words(own)}; give another folder, or --overwrite"

    def _files_at(self, names: list[str], listed: set[str]) -> Iterator[Path]:
        for name in names:
            path = self.root / name
            if path.is_dir() and not name.endswith("/"):
                yield path
            if name.endswith("/") and name in listed:
                # What a killed process left beside it and in it is the command's own: `recover` deals with it.
                yield from (file for file in files_below(path) if not _is_aside(file.relative_to(path).parts[:-1]))
            else:
                for place in (path, *neighbours(path)) if name.endswith("/") else (path,):
                    yield from files_below(place)

    # --------------------------------------------------------------------------------------------------------- writing

    def save_folder(self, path: Path, write: Callable[[Path], None]) -> None:
        """Replace a folder by what `write` puts into an empty one; a user's files in it go over to the new one."""

        def write_and_list(fresh: Path) -> None:
            write(fresh)
            listed = {f"{self._name(path)}/{file.relative_to(fresh).as_posix()}" for file in files_below(fresh)}
            self.claim(listed)  # before the folder gets its name: whatever ends the process, it is known whose it is

        save_folder(path, write_and_list, own=self._own_below(path))

    def remove_folder(self, path: Path) -> bool:
        """Remove a folder's own files, and the folder if nothing else is in it; returns whether it had any. They are
        gone at once: a process that is killed leaves none of them under their names."""
        own = self._own_below(path)
        if own:
            removing = neighbours(path)[2]
            os.rename(path, removing)
            discard(removing, path, own)
            if not removing.exists():  # else `recover` has something left to do
                self.claim([], dropped=(f"{self._name(path)}/{name}" for name in own))
        return bool(own)

    def recover(self) -> None:
        """Undo what a killed process left behind in the middle of a save or a removal."""
        for name in self.listed():
            if name.endswith("/"):
                folder = self.root / name
                for path in (folder, *_hidden_in(folder)):
                    recover(path, self._listed_below(path))

    def _listed_below(self, path: Path) -> set[str]:
        prefix = self._name(path) + "/"
        return {name.removeprefix(prefix) for name in self.listed() if name.startswith(prefix)}

    def clear(self) -> None:
        """Remove what the command wrote here, and nothing else."""
        self.recover()
        listed = self.listed()
        folders = set()
        for name in sorted(listed):
            path = self.root / name
            if not name.endswith("/") and os.path.lexists(path) and self._is_own(path, listed):
                path.unlink()
            folders |= {p for p in [path, *path.parents] if p.is_relative_to(self.root) and p != self.root}
        for folder in sorted(folders, reverse=True):
            with suppress(OSError):  # it holds something else, or is a file
                folder.rmdir()
        if listed:
            self.claim([], dropped=listed)

    # ------------------------------------------------------------------------------------------------------------ lock

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the folder against other processes; ends with the process. Raises OSError when another one holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise OSError(
                f"{self.root} is in use: another process of this package writes there; wait for it, end it, or give "
                "another folder"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def find_holder(self) -> Iterator[str]:
        """The problem that another process holds the folder."""
        if (self.root / LOCK).exists():
            try:
                with self.hold():
                    return
            except OSError as error:
                yield str(error)


def _hidden_in(folder: Path) -> Iterator[Path]:
    """The names that folders in `folder` had before a killed process renamed them."""
    for place in folder.glob(".*.*"):
        if _is_aside((place.name,)):
            yield place.with_name(place.name.rpartition(".")[0].removeprefix("."))


def _is_aside(folders: tuple[str, ...]) -> bool:
    """Whether the first of these names of folders is one that a folder has while it is written, replaced or removed."""
    return bool(folders) and folders[0].startswith(".") and folders[0].rpartition(".")[2] in ASIDE


def _words(names: list[str]) -> str:
    more = " and more" if len(names) > SHOWN else ""
    return ", ".join(islice(names, SHOWN)) + more
