"""A run that was stopped, killed or interrupted goes on to the numbers of one that never was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_tnt.train.cli import main
from modeling_tnt.train.common.output_folder import LOCK
from modeling_tnt.train.loop import trainer
from modeling_tnt.train.loop.checkpoint import (
    STATE_FILE,
    TENSORS_FILE,
    read_state,
    read_tensors,
    write_checksums,
    write_state,
)
from modeling_tnt.train.loop.report import read_log
from modeling_tnt.train.loop.run_folder import RunFolder

LONGER = ["--stages.stage1.steps", "7", "--stages.stage2.share", "0.6", "--output.eval-every", "3",
          "--output.keep-checkpoints", "3"]  # fmt: skip
# Timings differ between any two runs, and nothing else does.
TIMES = ("tokens_per_second", "seconds")


def _log(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(run / "log.jsonl")]


def _assert_same_run(run: Path, expected: Path) -> None:
    assert _log(run) == _log(expected)
    for name in ("stage1", "stage2", "best"):
        weights, wanted = (load_file(r / name / "model.safetensors") for r in (run, expected))
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[k], wanted[k]) for k in wanted), name
    assert (run / "sample.txt").read_text() == (expected / "sample.txt").read_text()
    checkpoints = [sorted(p.name for p in (r / "checkpoints").iterdir()) for r in (run, expected)]
    assert checkpoints[0] == checkpoints[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, Path]:
    """Filled by the first test that needs it, with the fixtures of one test."""
    return {}


@pytest.fixture
def expected(flags, uninterrupted, tmp_path_factory) -> Path:
    """The same training without interruptions; the text that it reads is drawn from a fixed seed."""
    if not uninterrupted:
        uninterrupted["run"] = tmp_path_factory.mktemp("expected") / "run"
        assert main([*flags, *LONGER, "--output.dir", str(uninterrupted["run"])]) == 0
    return uninterrupted["run"]


@pytest.mark.parametrize(
    ("steps", "where"),
    [
        pytest.param(3, "stage1", marks=pytest.mark.slow), (7, "the swap"), (9, "stage2"),
        pytest.param(11, "the end of stage2", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_stopped_and_resumed(flags, expected: Path, tmp_path: Path, monkeypatch, capsys, steps: int, where: str):
    """By SIGTERM in mid-stage-1, at the swap, in mid-stage-2 and at the end: equal losses and weights, bit by bit."""
    taken = []
    take_step = trainer.Session.take_step

    def stop_after(self, *args):
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, *args)

    monkeypatch.setattr(trainer.Session, "take_step", stop_after)
    assert main([*flags, *LONGER]) == 143
    stage, step = ("stage1", steps) if steps <= 7 else ("stage2", steps - 7)
    message = capsys.readouterr().err
    assert f"stopped in {stage} at step {step}; the last checkpoint is kept in" in message
    assert f"{stage}-{step:08d}" in message
    assert main([*flags, *LONGER, "--resume"]) == 0
    assert "resumed  from" in capsys.readouterr().out
    assert len(taken) == 11
    _assert_same_run(tmp_path / "run", expected)


def test_ctrl_c_stops_after_the_step_and_a_second_one_at_once(flags, tmp_path: Path, monkeypatch, capsys):
    take_step = trainer.Session.take_step
    presses = [1, 2]

    def press(self, *args):
        for _ in range(presses[0]):
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(self, *args)

    monkeypatch.setattr(trainer.Session, "take_step", press)
    assert main(flags) == 130
    assert (tmp_path / "run" / "checkpoints" / "stage1-00000001").is_dir()
    assert "stopped in stage1 at step 1" in capsys.readouterr().err
    presses.pop(0)
    assert main([*flags, "--resume"]) == 130
    assert "what was saved is kept" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_adapters_are_resumed(flags, tmp_path: Path, monkeypatch):
    """A checkpoint within a stage with LoRA holds the adapter; its base is the stage before."""
    flags = [*flags, "--stages.stage2.share", "none", "--stages.stage2.steps", "4", "--stages.stage2.trainable", "lora"]
    assert main([*flags, "--output.dir", str(tmp_path / "whole")]) == 0
    take_step = trainer.Session.take_step

    def stop(self, *args):
        if self.state.stage == 1 and self.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, *args)

    monkeypatch.setattr(trainer.Session, "take_step", stop)
    assert main(flags) == 143
    checkpoint = tmp_path / "run" / "checkpoints" / "stage2-00000002"
    assert {p.name for p in checkpoint.glob("*.safetensors")} == {"adapter_model.safetensors", TENSORS_FILE}
    monkeypatch.setattr(trainer.Session, "take_step", take_step)
    assert main([*flags, "--resume"]) == 0
    assert _log(tmp_path / "run") == _log(tmp_path / "whole")
    weights, wanted = (load_file(tmp_path / r / "stage2" / "model.safetensors") for r in ("run", "whole"))
    assert all(torch.equal(weights[k], wanted[k]) for k in wanted)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(flags, expected: Path, tmp_path: Path, monkeypatch,
                                                                  capsys):  # fmt: skip
    take_step = trainer.Session.take_step

    def stop(self, *args):
        if self.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, *args)

    monkeypatch.setattr(trainer.Session, "take_step", stop)
    assert main([*flags, *LONGER]) == 143
    checkpoints = tmp_path / "run" / "checkpoints"
    newest, half_written = checkpoints / "stage1-00000005", checkpoints / ".stage1-00000006.saving"
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    half_written.mkdir()
    (half_written / STATE_FILE).write_text("{")
    monkeypatch.setattr(trainer.Session, "take_step", take_step)
    assert main([*flags, *LONGER, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert f"{newest} is damaged: model.safetensors" in printed
    assert f"resumed  from {checkpoints / 'stage1-00000004'}" in printed
    assert not half_written.exists()
    _assert_same_run(tmp_path / "run", expected)


@pytest.mark.slow
def test_no_whole_checkpoint_is_an_error_and_a_lost_log_is_not(flags, tmp_path: Path, capsys):
    run, short = tmp_path / "run", [*flags, "--stages.stage1.steps", "2", "--resume"]
    assert main(short) == 0
    (run / "log.jsonl").unlink()
    (run / "checkpoints" / "stage2-00000001" / STATE_FILE).write_text("")
    assert main(short) == 0
    printed = capsys.readouterr().out
    assert f"stage2-00000001 is damaged: {STATE_FILE}" in printed
    assert f"{run / 'log.jsonl'} was cut off or removed" in printed
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"stage1-00000002", "stage2-00000001"}
    stage1, stage2 = sorted(run.glob("checkpoints/*"))
    (stage1 / STATE_FILE).unlink()
    saved = read_state(stage2)
    write_state(stage2, saved | {"state": saved["state"] | {"later": 1}}, read_tensors(stage2))
    write_checksums(stage2)
    assert main(short) == 1
    assert f"{stage2} is damaged: {STATE_FILE} holds no state that this version knows" in capsys.readouterr().out
    (stage2 / STATE_FILE).unlink()
    assert main(short) == 1
    assert f"no checkpoint in {run / 'checkpoints'} is whole ({STATE_FILE} is missing)" in capsys.readouterr().err


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.save_folder(folder.checkpoint("a", step), lambda fresh: (fresh / STATE_FILE).touch())
    assert folder.prune(["a"], 1, damaged=[folder.checkpoint("a", 3)])
    assert folder.newest_first(["a"]) == [folder.checkpoint("a", 2)] and not folder.prune(["a"], 1)


@pytest.mark.slow
def test_resume_on_changed_data_is_refused(flags, text_folder: Path, tmp_path: Path, capsys):
    short = [*flags, "--stages.stage1.steps", "1"]
    assert main(short) == 0
    os.utime(text_folder / "3.txt", (1, 1))  # the text is the same
    assert main([*short, "--resume"]) == 0
    text = (text_folder / "3.txt").read_text()
    (text_folder / "3.txt").write_text(text.replace("memory", "remory"))
    assert main([*short, "--resume"]) == 2
    message = capsys.readouterr().err
    assert (
        "--output.resume: the data is not what it was when" in message
        and "go on with the new one by --output.accept-changed-data" in message
    )
    assert main([*short, "--resume", "--output.accept-changed-data"]) == 0


@pytest.mark.slow
def test_resume_without_a_run_begins_one(flags, tmp_path: Path):
    assert main([*flags, "--resume", "--stages.stage1.steps", "1"]) == 0
    assert main([*flags, "--resume", "--stages.stage1.steps", "1"]) == 0  # finished: scored again, nothing trained
    assert len([r for r in _log(tmp_path / "run") if r["event"] == "step"]) == 2


def test_a_run_without_its_recipe_is_neither_resumed_nor_replaced_unasked(flags, tmp_path: Path, capsys):
    folder = RunFolder(tmp_path / "run")
    folder.claim(["metrics.json"])
    folder.metrics_file.touch()
    assert main([*flags, "--resume"]) == 2 and main(flags) == 2
    message = capsys.readouterr().err
    assert "has no recipe.yaml; give another folder" in message and "holds another run; give another" in message


def test_a_broken_recipe_in_a_run_is_named(flags, tmp_path: Path, capsys):
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text("a: [")
    assert main([*flags, "--resume"]) == 2
    assert str(recipe) in (message := capsys.readouterr().err) and "is not valid YAML" in message


def test_resume_with_another_recipe_is_refused(flags, tmp_path: Path, capsys):
    assert main([*flags, "--stages.stage1.steps", "1"]) == 0
    more = ["--stages.stage1.steps", "2", "--training.seed", "3", "--output.keep-checkpoints", "5"]
    assert main([*flags, "--resume", *more]) == 2
    message = capsys.readouterr().err
    assert "--stages.stage1.steps is 2 and was 1 when the run began" in message
    assert "--training.seed is 3 and was 0" in message and "keep-checkpoints" not in message


def _start(flags: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "modeling_tnt.train.cli", *flags, *LONGER, "--resume"], env=env,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_times(flags, expected: Path, tmp_path: Path):
    """SIGKILL, at moments drawn anew each time, until the run gets through. TNT_KILLS sets how often (3)."""
    kills, draw = int(os.environ.get("TNT_KILLS", "3")), random.Random(time.time_ns())
    log = tmp_path / "run" / "log.jsonl"
    flags = [*flags, "--output.checkpoint-every", "1"]
    for _ in range(kills):
        process = _start(flags)
        before = log.stat().st_mtime_ns if log.exists() else 0
        # Importing takes seconds and training a few: the moment counts from the first line that this process logs.
        while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.0))
        process.kill()
        process.wait()
    last = _start(flags)
    assert last.wait(timeout=300) == 0, last.stderr.read().decode()
    _assert_same_logs_and_weights(tmp_path / "run", expected)


def _assert_same_logs_and_weights(run: Path, expected: Path) -> None:
    """As `_assert_same_run`, for runs that keep checkpoints at other steps."""
    assert _log(run) == _log(expected)
    for name in ("stage1", "stage2", "best"):
        weights, wanted = (load_file(r / name / "model.safetensors") for r in (run, expected))
        assert all(torch.equal(weights[k], wanted[k]) for k in wanted), name
    assert {p.name for p in run.rglob(".*")} == {LOCK}
