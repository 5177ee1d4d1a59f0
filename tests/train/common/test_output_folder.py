"""A user's files survive: only what the manifest lists is replaced or removed, and one process at a time writes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from modeling_tnt.hub_cards import CARD_FILE, facts
from modeling_tnt.train.cli import main
from modeling_tnt.train.common.files import files_below
from modeling_tnt.train.common.output_folder import LOCK, MANIFEST, OutputFolder
from modeling_tnt.train.loop.checkpoint import CHECKSUMS_FILE
from modeling_tnt.train.loop.run_folder import RunFolder

NAMES = ["result.json", "model/"]


def _content(root: Path) -> dict[str, str]:
    """The files of a folder without those that the package keeps for itself."""
    kept = (p for p in files_below(root) if p.name not in (MANIFEST, LOCK))
    return {p.relative_to(root).as_posix(): p.read_text() for p in kept}


def _save(folder: OutputFolder, text: str) -> None:
    folder.save_folder(folder.root / "model", lambda fresh: (fresh / "weights").write_text(text))


def _problems(folder: OutputFolder, *, overwrite: bool = True) -> str:
    return "\n".join(folder.find_problems(NAMES, overwrite=overwrite))


@pytest.fixture
def used(tmp_path: Path) -> OutputFolder:
    """A folder with what a command wrote."""
    folder = OutputFolder(tmp_path / "out", "eval")
    folder.claim(NAMES)
    (folder.root / "result.json").write_text("{}")
    _save(folder, "1")
    return folder


# ------------------------------------------------------------------------------------------------------------ manifest


@pytest.mark.parametrize(
    "name", ["result.json", "result.json/x", "model/thesis.tex", ".model.saving/x", ".model.removing/x"]
)
def test_a_users_file_under_a_name_that_is_written_is_in_the_way(tmp_path: Path, name: str):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    (tmp_path / "other.txt").write_text("not in the way")
    problem = _problems(OutputFolder(tmp_path, "eval"))
    assert (
        f"holds {name.removesuffix('/x')}" in problem
        and "under names that tnt eval writes" in problem
        and "other.txt" not in problem
    )


def test_own_files_are_replaced_when_asked_and_those_of_another_command_never(used: OutputFolder):
    assert _problems(used) == ""
    assert "holds result.json, model/weights; give another folder, or --overwrite" in _problems(used, overwrite=False)
    assert "under names that tnt bench writes" in _problems(OutputFolder(used.root, "bench"))


def test_clear_removes_what_is_listed_and_nothing_else(used: OutputFolder):
    (used.root / "model" / "photo.raw").write_text("mine")
    (used.root / "notes").mkdir()
    used.clear()
    assert _content(used.root) == {"model/photo.raw": "mine"} and (used.root / "notes").is_dir()
    assert used.listed() == set()


def test_a_link_in_the_place_of_a_folder_is_not_followed(used: OutputFolder, tmp_path: Path):
    os.rename(used.root / "model", tmp_path / "elsewhere")
    (used.root / "model").symlink_to(tmp_path / "elsewhere")
    assert "holds model under names" in _problems(used)
    used.clear()
    assert (tmp_path / "elsewhere" / "weights").read_text() == "1" and (used.root / "model").is_symlink()


def test_an_edited_card_is_the_users(used: OutputFolder):
    for name in (CARD_FILE, facts.FACTS_FILE):
        (used.root / "model" / name).write_text("edited")
        used.claim([f"model/{name}"])
    assert f"holds model/{CARD_FILE} under names" in _problems(used)


def test_a_users_file_goes_over_to_the_folder_that_replaces_its_own(used: OutputFolder):
    (used.root / "model" / "sub").mkdir()
    (used.root / "model" / "sub" / "notes.txt").write_text("mine")
    _save(used, "2")
    assert _content(used.root) == {"result.json": "{}", "model/weights": "2", "model/sub/notes.txt": "mine"}


@pytest.mark.parametrize("moment", ["replaced", "removed"])
def test_a_kill_while_old_files_are_removed_leaves_no_part_of_them(used: OutputFolder, monkeypatch, moment: str):
    """The rename has been done, and nothing else; the next process removes the rest and keeps what is the user's."""
    (used.root / "model" / "notes.txt").write_text("mine")
    with monkeypatch.context() as killed:
        for module in ("files", "output_folder"):
            killed.setattr(
                f"modeling_tnt.train.common.{module}.discard", lambda aside, *_: aside.exists() and os._exit(9)
            )
        pid = os.fork()
        if pid == 0:
            _save(used, "2") if moment == "replaced" else used.remove_folder(used.root / "model")
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    used.recover()
    expected = {"model/weights": "2"} if moment == "replaced" else {}
    assert _content(used.root) == {"result.json": "{}", "model/notes.txt": "mine"} | expected


@pytest.mark.parametrize("aside", ["saving", "previous", "removing"])
def test_what_a_kill_left_in_a_listed_folder_is_not_in_the_way(used: OutputFolder, aside: str):
    """A process was killed in the middle of its first save, or of a removal, below a folder that it had listed."""
    left = used.root / "model" / f".step-1.{aside}"
    left.mkdir()
    (left / "half").write_text("1")
    if aside != "saving":
        used.claim(["model/step-1/half"])
    assert _problems(used) == ""
    used.clear()
    assert _content(used.root) == {}


@pytest.mark.parametrize("text", ["", "[]", '{"written_by": {"eval": [3]}}', '{"written_by": {"eval": ["../x"]}}'])
def test_a_manifest_that_is_no_good_is_named(tmp_path: Path, text: str):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=MANIFEST):
        OutputFolder(tmp_path, "eval").clear()


# ---------------------------------------------------------------------------------------------------------------- lock


def test_a_folder_is_held_by_one_process_and_a_killed_one_lets_go(tmp_path: Path):
    folder = OutputFolder(tmp_path, "eval")
    ready, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        with folder.hold():
            os.write(hold, b".")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(OSError, match="is in use"), folder.hold():
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with folder.hold():
        pass


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_a_run_does_not_begin_among_a_users_files(flags, tmp_path: Path, capsys, more: list[str]):
    mine = {
        "best/photo.raw": "raw",
        "stage1/thesis.tex": "tex",
        "checkpoints/step-1/weights.pt": "pt",
        "sample.txt": "s",
    }
    for name, text in mine.items():
        (path := tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert main([*flags, *more]) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in mine) and "Traceback" not in message
    assert _content(tmp_path / "run") == mine


@pytest.mark.slow
def test_a_run_that_is_replaced_leaves_a_users_files(flags, tmp_path: Path, capsys):
    short, run = [*flags, "--stages.stage1.steps", "1"], tmp_path / "run"
    assert main(short) == 0
    (run / "stage1" / "thesis.tex").write_text("mine")
    assert main([*short, "--overwrite"]) == 2
    assert "holds stage1/thesis.tex under names" in capsys.readouterr().err
    # A run whose stages have other names does not write there.
    recipe = {"stages": [{"name": "only", "steps": 1}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    at = short.index("--stages.stage1.steps")
    other = [*short[:at], *short[at + 2 : -2], "--config", str(tmp_path / "r.yaml")]
    assert main([*other, "--overwrite"]) == 0
    assert [p.name for p in (run / "stage1").iterdir()] == ["thesis.tex"] and not (run / "stage2").exists()
    assert json.loads((run / "metrics.json").read_text())["stages"][0]["name"] == "only"


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_resumed_and_not_replaced(flags, tmp_path: Path, capsys):
    """It has no manifest and no checksums."""
    run = tmp_path / "run"
    assert main([*flags, "--stages.stage1.steps", "2"]) == 0
    for path in [run / MANIFEST, *run.glob(f"checkpoints/*/{CHECKSUMS_FILE}")]:
        path.unlink()
    state = run / "checkpoints" / "stage1-00000002" / "trainer_state.json"
    state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != "data"}))
    before = set(_content_names(run))
    assert main([*flags, "--stages.stage1.steps", "2", "--overwrite"]) == 2
    assert "of an earlier version, which kept no list: --output.resume goes on with it" in capsys.readouterr().err
    assert set(_content_names(run)) == before
    assert main([*flags, "--stages.stage1.steps", "2", "--resume"]) == 0
    assert "is of an earlier version; what that wrote is never removed" in capsys.readouterr().out
    assert RunFolder(run).listed()


def _content_names(root: Path) -> list[Path]:
    return [p for p in files_below(root) if p.name != LOCK]


@pytest.mark.parametrize("more", [["--resume"], ["--overwrite"], []])
def test_a_run_in_a_live_folder_is_refused(flags, tmp_path: Path, capsys, more: list[str]):
    with RunFolder(tmp_path / "run").hold():
        assert main([*flags, *more]) == 2
    message = capsys.readouterr().err
    assert "is in use: another process" in message and "Traceback" not in message
