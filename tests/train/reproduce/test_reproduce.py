"""`tnt reproduce table3`: its recipes, its runs beside each other, and what it says of them."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

from modeling_tnt.train.cli import main
from modeling_tnt.train.common.files import files_below
from modeling_tnt.train.common.model_facts import count_parameters
from modeling_tnt.train.common.output_folder import LOCK, MANIFEST, OutputFolder
from modeling_tnt.train.data import load_data
from modeling_tnt.train.loop.report import read_log
from modeling_tnt.train.loop.signals import Stopper
from modeling_tnt.train.options import to_mapping
from modeling_tnt.train.reproduce import jobs as jobs_module
from modeling_tnt.train.reproduce import runs as runs_module
from modeling_tnt.train.reproduce.arguments import Table3Arguments
from modeling_tnt.train.reproduce.jobs import make_jobs, merge
from modeling_tnt.train.reproduce.paper import BASE, CLAIMS, HYBRIDS, ROWS
from modeling_tnt.train.reproduce.picture import COLORS, describe_lines, draw_table
from modeling_tnt.train.reproduce.report import _attention, chance_beyond, summarize
from modeling_tnt.train.reproduce.results import (
    HOLDS,
    NOISE,
    REVERSED,
    UNKNOWN,
    RowResult,
    bytes_per_token,
    collect,
    difference_to_base,
    judge,
)
from modeling_tnt.train.reproduce.runs import Job, Runner, begin_from_first_stage, claim_runs, find_other_settings
from modeling_tnt.train.reproduce.scales import SCALES


@pytest.fixture
def overrides(text_folder: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "data.sources": [str(text_folder)], "data.cache_dir": str(tmp_path / "cache"), "data.validation_share": 0.2,
    }  # fmt: skip


@pytest.fixture
def smoke(overrides, tmp_path: Path):
    """The jobs of the scale smoke, on ten small text files."""

    def make(**changes: object) -> list[Job]:
        folder = tmp_path / "table3"
        fields = {"scale": "smoke", "override": overrides, "output_dir": folder, "device": "cpu"} | changes
        return make_jobs(Table3Arguments(**fields).resolve())

    return make


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_has_every_row_at_equal_tokens_and_parameters(scale: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(jobs_module, "load_tokenizer", lambda name: ByT5Tokenizer())  # T5's would be downloaded
    jobs = make_jobs(Table3Arguments(scale=scale, seeds=2, output_dir=tmp_path).resolve())

    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs), "seed by seed"
    first = {job.row: job for job in jobs if job.seed == 0}
    own = [key for key, row in ROWS.items() if row.read_from is None and row.group != HYBRIDS]
    reads_raw = first[BASE].config.qk_projection == "none"
    assert [*first] == [key for key in own if key != ("no-projection" if reads_raw else "projection")]
    assert {len(first[f"tnt-{n}"].config.local_chunk_sizes) for n in range(5)} == set(range(5))
    tokens = {job.stages[0].steps * job.recipe.training.batch_size * job.stages[0].seq_len for job in jobs}
    assert len(tokens) == 1
    assert len({json.dumps(to_mapping(job.recipe.data)) for job in jobs}) == 1
    assert len({json.dumps(to_mapping(job.recipe.optimizer)) for job in jobs}) == 1

    # At 150M parameters the recipes are the papers'; elsewhere widths make up for what memories add.
    sizes = {row: count_parameters(job.config) for row, job in first.items() if row != "llama"}
    bound = 0.02 if SCALES[scale].width_step else 0.25
    fitted = sizes if scale != "smoke" else {k: v for k, v in sizes.items() if k != "tnt-4"}  # no room left in it
    assert all(abs(size / sizes[BASE] - 1) < bound for size in fitted.values()), sizes

    assert first["no-global"].config.global_chunk_size is None
    other = first["projection" if reads_raw else "no-projection"].config.qk_projection
    assert (other == "none") != reads_raw
    assert first["titans-small"].config.local_chunk_sizes == first[BASE].config.local_chunk_sizes
    assert first["titans-large"].config.local_chunk_sizes > first["titans-small"].config.local_chunk_sizes


@pytest.mark.parametrize("scale", SCALES)
def test_hybrids_are_rows_when_they_are_asked_for(scale: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(jobs_module, "load_tokenizer", lambda name: ByT5Tokenizer())
    ours = ["hybrid", "titans-mac", "titans-mag", "titans-mal"]
    paper = Table3Arguments(scale=scale, output_dir=tmp_path).resolve().rows
    with_hybrids = Table3Arguments(scale=scale, output_dir=tmp_path, hybrids=True).resolve().rows
    assert with_hybrids == [*paper, *ours] and not set(ours) & set(paper)
    jobs = make_jobs(Table3Arguments(scale=scale, seeds=1, rows=[BASE], hybrids=True, output_dir=tmp_path).resolve())
    base, *hybrids = jobs
    assert [job.row for job in jobs] == [BASE, *ours]
    assert {job.stages[0].steps for job in jobs} == {base.stages[0].steps}
    assert [job.config.memory_as for job in hybrids] == [None, "context", "gate", "layer"]
    assert set(hybrids[0].config.layer_types) == {"tnt_memory", "full_attention"}
    assert {row.group for row in ROWS.values()} == set(COLORS)
    said = [_attention(job.config) for job in jobs]
    assert said[0] == "" and re.match(r"; full attention in \d of \d+ blocks instead$", said[1]), said
    for words, config in zip(said[2:], (job.config for job in hybrids[1:]), strict=True):
        reach = config.global_chunk_size if config.memory_as == "context" else config.sliding_window
        assert words.startswith(f"; {config.memory_as} of attention within {reach}, "), words
    sizes = [count_parameters(job.config) for job in jobs]
    if scale != "smoke":  # whose blocks are too small to pay for attention
        assert sizes == pytest.approx([sizes[0]] * 5, rel=0.02)


@pytest.mark.parametrize("scale", SCALES)
def test_what_goes_on_from_the_base_row_has_its_first_stage(scale: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(jobs_module, "load_tokenizer", lambda name: ByT5Tokenizer())
    jobs = make_jobs(Table3Arguments(scale=scale, seeds=1, output_dir=tmp_path).resolve())
    first = {job.row: job for job in jobs}
    base, swap, control = first[BASE], first["stage2"], first["more-steps"]
    for job in (swap, control):
        assert job.parent is base
        own, other = to_mapping(job.recipe), to_mapping(base.recipe)
        assert own["stages"][0] == other["stages"][0] and len(own["stages"]) == 2 > len(other["stages"])
        for mapping in (own, other):
            mapping["stages"] = mapping["output"]["dir"] = None
        assert own == other
    assert max(swap.stages[1].local_chunk_sizes) < max(base.config.local_chunk_sizes)
    assert control.stages[1].local_chunk_sizes == base.config.local_chunk_sizes
    assert swap.steps == control.steps == swap.stages[1].steps < base.steps
    assert swap.stages[1].learning_rate == control.stages[1].learning_rate


def test_rows_bring_along_what_they_begin_with(smoke):
    assert [job.row for job in smoke(rows=["swapped"], seeds=1)] == [BASE, "stage2"]


def test_tokens_and_fields_are_replaced_in_every_row(smoke, overrides):
    jobs = smoke(tokens=1000.0, override=overrides | {"training.batch_size": 1, "model.override.memory_expansion": 1})
    assert {(job.stages[0].steps, job.config.memory_expansion) for job in jobs if job.row != "ttt-mlp"} == {(16, 1)}
    assert len({job.recipe.training.seed for job in jobs}) == 3


def test_merge_replaces_lists_and_keeps_its_arguments():
    below = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merge(below, {"a": {"c": [3]}, "e": {}}) == {"a": {"b": 1, "c": [3]}, "d": 1, "e": {}}
    assert below == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scale", "huge", "--seeds", "0", "--rows", "tnt-9", "--tokens", "-1"],
         ["--scale must be one of smoke", "--seeds must be at least 1", "got 'tnt-9'", "--tokens must be positive"]),
        (["--scale", "smoke", "--override", "stages.stage1.steps=3", "training.seed=3"],
         ["'stages.stage1.steps'", "use --seeds"]),
        (["--scale", "smoke", "--override", "training.batch_sise=3"], ["training.batch_sise", "did you mean"]),
        (["--scale", "smoke", "--override", "training.batch_size=0"],
         ["--training.batch-size must be at least 1, got 0 (all rows)"]),
        (["--scale", "smoke", "--override", "model.override.local_shard_lengths=12"], ["local_chunk_sizes"]),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_used_are_named_together(flags, words, tmp_path: Path, capsys):
    assert main(["reproduce", "table3", "--output-dir", str(tmp_path / "t"), *flags]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_runs_of_other_settings_are_refused(smoke):
    job = smoke(seeds=1)[0]
    job.folder.root.mkdir(parents=True)
    job.folder.recipe_file.write_text(yaml.safe_dump(to_mapping(job.recipe)))
    assert find_other_settings(smoke(seeds=1)) == []
    problems = find_other_settings(smoke(seeds=1, tokens=1e4))
    assert problems == [
        f"{job.folder.root} was made with stages.stage1.steps=6, now it is None",
        f"{job.folder.root} was made with stages.stage1.tokens=None, now it is 10000.0",
    ]


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_that_begins_with_another_ones_first_stage_is_an_ordinary_run(smoke, tmp_path: Path):
    jobs = {job.row: job for job in smoke(rows=["stage2"], seeds=1)}
    base, branch = jobs[BASE], jobs["stage2"]
    for job in (base, branch):
        if job.parent is not None:
            begin_from_first_stage(job)
        recipe = tmp_path / f"{job.name}.yaml"
        recipe.write_text(yaml.safe_dump(to_mapping(job.recipe)))
        assert main(["train", "--config", str(recipe), "--resume"]) == 0
    ordinary = tmp_path / "ordinary"
    assert main(["train", "--config", str(recipe), "--output.dir", str(ordinary)]) == 0

    weights, wanted = (load_file(r / "stage2" / "model.safetensors") for r in (branch.folder.root, ordinary))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    losses, wanted = (
        [record.get("loss_nats_per_token") for record in read_log(r / "log.jsonl")]
        for r in (branch.folder.root, ordinary)
    )
    assert losses == wanted and len(losses) > branch.steps
    metrics, expected = (json.loads((r / "metrics.json").read_text()) for r in (branch.folder.root, ordinary))
    assert metrics["validation_bits_per_byte"] == expected["validation_bits_per_byte"]

    results = {r.key: r for r in collect([BASE, "swapped", "stage2"], list(jobs.values()), {})}
    scores = expected["validation_bits_per_byte"]
    assert results[BASE].losses == {0: scores["after_stage1"]}
    assert results["swapped"].losses == {0: scores["after_stage1_at_stage2_chunks"]}
    assert results["stage2"].losses == {0: scores["after_stage2"]}
    assert results["stage2"].tokens == 1.5 * results[BASE].tokens


FAKE_TRAINER = """
import json, os, pathlib, signal, sys, time, yaml
recipe = yaml.safe_load(open(sys.argv[1]))
folder = pathlib.Path(recipe["output"]["dir"])
mode = os.environ.get("FAKE_TRAINER", recipe["data"]["split"])
if mode == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (folder.mkdir(parents=True), (folder / "saved").touch(), sys.exit(143)))
    print("waiting", flush=True)
    time.sleep(60)
if mode == "fail":
    print("tnt train: error: the loss is nan at step 3\\n  of stage1", file=sys.stderr)
    sys.exit(1)
folder.mkdir(parents=True, exist_ok=True)
(folder / "began").write_text(str(time.monotonic()))
time.sleep(0.1)
last = recipe["stages"][-1]["name"]
stage = {"name": last, "tokens": 1, "local_chunk_sizes": [], "steps": 6, "tokens_per_second": 100.0}
metrics = {"validation_bits_per_byte": {"after_" + last: 2.0}, "validation_tokens": 64, "parameters": 1,
           "stages": [stage]}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture
def fake_trainer(tmp_path: Path, monkeypatch) -> None:
    """A process that does what `data.split`, or FAKE_TRAINER, says: train (in a moment), fail, or wait for SIGTERM."""
    script = tmp_path / "fake_trainer.py"
    script.write_text(FAKE_TRAINER)
    monkeypatch.setattr(runs_module, "trainer_command", lambda recipe: [sys.executable, str(script), str(recipe)])


def _runner(jobs: list[Job], stopping: Callable[[], bool] = lambda: False) -> Runner:
    return Runner(jobs, workers=2, device="cpu", stopping=stopping)


def _began(job: Job) -> float:
    return float((job.folder.root / "began").read_text())


def test_seeds_follow_each_other_and_finished_runs_are_not_run_again(smoke, fake_trainer, capsys):
    jobs = smoke(rows=[BASE, "tnt-2", "no-global"], seeds=2)
    _runner(jobs).run()
    assert all(job.finished for job in jobs)
    began = [_began(job) for job in jobs]
    assert max(began[:2]) < min(began[2:]), "the first two are started together"
    assert max(began[:3]) < max(began[3:])
    assert capsys.readouterr().out.count("2.0000 bits/byte") == 6
    assert _runner(jobs).run() == {} and [_began(job) for job in jobs] == began


def test_a_run_that_fails_stops_only_what_begins_with_it(smoke, fake_trainer, capsys):
    jobs = smoke(rows=["stage2", "tnt-2"], seeds=1)
    failing = next(job for job in jobs if job.row == BASE)
    failing.recipe.data.split = "fail"
    failures = _runner(jobs).run()
    assert failures == {
        f"{BASE}-seed0": "the loss is nan at step 3 of stage1",
        "stage2-seed0": f"{BASE}-seed0, which it begins with, failed",
    }
    assert next(job for job in jobs if job.row == "tnt-2").finished
    results = {r.key: r for r in collect([BASE, "tnt-2"], jobs, failures)}
    assert results[BASE].failures == {0: "the loss is nan at step 3 of stage1"} and results["tnt-2"].losses == {0: 2.0}


STOP_WHEN_RUNNING = """
import os, pathlib, sys, time
logs = [pathlib.Path(name) for name in sys.argv[3:]]
while not all(log.exists() and log.read_text() for log in logs):
    time.sleep(0.05)
os.kill(int(sys.argv[1]), int(sys.argv[2]))
"""


def _stop_when_running(number: signal.Signals, logs: list[Path]) -> None:
    """Send this process a signal once all logs have a line."""
    words = [str(os.getpid()), str(int(number)), *map(str, logs)]
    subprocess.Popen([sys.executable, "-c", STOP_WHEN_RUNNING, *words])


@pytest.mark.parametrize("cause", ["signal", "time limit"])
def test_a_stop_lets_runs_save_and_starts_no_more(cause: str, smoke, fake_trainer):
    jobs = smoke(rows=[BASE, "tnt-2", "tnt-3"], seeds=1)
    for job in jobs:
        job.recipe.data.split = "wait"
    logs = [job.folder.root.parent / f"{job.name}.log" for job in jobs]
    began = time.monotonic()
    with Stopper() as stopper:
        if cause == "signal":
            _stop_when_running(signal.SIGTERM, logs[:2])
            failures = _runner(jobs, lambda: stopper.signal is not None).run()
        else:
            failures = _runner(jobs, lambda: time.monotonic() > began + 3.0).run()
    assert time.monotonic() - began < 30
    assert stopper.signal == (signal.SIGTERM if cause == "signal" else None)
    assert failures == {}
    assert [(job.folder.root / "saved").exists() for job in jobs] == [True, True, False]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_and_the_same_command_goes_on(
    number: signal.Signals, status: int, overrides, fake_trainer, tmp_path: Path, capsys, monkeypatch
):
    folder = tmp_path / "table3"
    flags = ["--rows", BASE, "--workers", "1", "--device", "cpu", "--override", *_as_flags(overrides)]
    _stop_when_running(number, [folder / f"runs/{BASE}-seed0.log"])
    monkeypatch.setenv("FAKE_TRAINER", "wait")
    assert _table3(folder, *flags) == status
    assert "1 of 1 runs are left; the same command goes on" in capsys.readouterr().err
    assert not json.loads((folder / "table3.json").read_text())["complete"]
    monkeypatch.delenv("FAKE_TRAINER")
    assert _table3(folder, *flags) == 0
    assert json.loads((folder / "table3.json").read_text())["rows"][BASE]["bits_per_byte"]["value"] == 2.0


def _as_flags(overrides: dict[str, object]) -> list[str]:
    return [f"{path}={json.dumps(value)}" for path, value in overrides.items()]


def _table3(folder: Path, *more: str) -> int:
    return main(["reproduce", "table3", "--scale", "smoke", "--seeds", "1", "--output-dir", str(folder), *more])


@pytest.mark.parametrize("place", [".", f"runs/{BASE}-seed0"], ids=["a reproduction", "a run that outlived its own"])
def test_a_folder_in_use_is_refused(tmp_path: Path, capsys, place: str):
    with OutputFolder(tmp_path / place, "train").hold():
        assert _table3(tmp_path) == 2
    assert "is in use: another process" in capsys.readouterr().err


def test_a_reproduction_replaces_its_own_files_only(smoke, tmp_path: Path, capsys):
    (tmp_path / "table3.md").write_text("mine")
    assert _table3(tmp_path) == 2 and _table3(tmp_path, "--overwrite") == 2
    assert "holds table3.md under names that tnt reproduce table3 writes" in capsys.readouterr().err
    (job,) = (job for job in smoke(seeds=1) if job.row == BASE)
    root = job.folder.root.parents[1]
    folder = OutputFolder(root, "reproduce table3")
    claim_runs(folder, [job], ["table3.md"], overwrite=False)
    job.folder.claim(["recipe.yaml"])
    for name in ("table3.md", f"runs/{job.name}.log", f"runs/{job.name}/recipe.yaml", f"runs/{job.name}/notes.txt"):
        (root / name).write_text("")
    claim_runs(folder, [job], ["table3.md"], overwrite=True)
    left = {p.relative_to(root).as_posix() for p in files_below(root) if p.name not in (MANIFEST, LOCK)}
    assert left == {f"runs/{job.name}/notes.txt"}


@pytest.mark.slow
def test_the_command_from_end_to_end(overrides, tmp_path: Path, capsys):
    folder = tmp_path / "table3"
    flags = ["--rows", BASE, "llama", "--device", "cpu", "--workers", "2", "--override", *_as_flags(overrides)]
    assert _table3(folder, *flags, "--time-limit", "1e-9") == 0
    assert "2 of 2 runs are left; the same command goes on" in capsys.readouterr().out
    assert _table3(folder, *flags) == 0
    report = json.loads((folder / "table3.json").read_text())
    assert report["complete"] and list(report["rows"]) == ["llama", BASE]
    for row in report["rows"].values():
        assert len(row["bits_per_byte_by_seed"]) == 1
        # ByT5's tokens are bytes, so the two differ by ln 2 where no document ends.
        nats = math.log(2) * row["bits_per_byte"]["value"]
        assert 0.95 * nats < row["nats_per_token"]["value"] <= nats * (1 + 1e-9)
    (stage,) = json.loads((folder / f"runs/{BASE}-seed0/metrics.json").read_text())["stages"]
    speed, steps = stage["tokens_per_second"], stage["steps"]
    assert report["rows"][BASE]["tokens_per_second"] == dict(median=speed, lowest=speed, highest=speed, steps=steps)
    text = (folder / "table3.md").read_text()
    assert f"| {speed:,.0f} (" in text and "of one thread each, timed themselves" in text
    assert "TNT, 1 local memory" in text and "| 21.04 |" in text and "compared here: 1; no verdict: 1." in text
    assert (folder / "table3.png").read_bytes().startswith(b"\x89PNG")

    times = {path: path.stat().st_mtime for path in folder.glob("runs/*/metrics.json")}
    assert _table3(folder, *flags, "--no-speed") == 0
    assert {path: path.stat().st_mtime for path in folder.glob("runs/*/metrics.json")} == times
    assert json.loads((folder / "table3.json").read_text())["rows"][BASE]["tokens_per_second"] is None
    assert "2 are finished" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- verdicts


def test_the_papers_numbers_say_what_the_claims_say():
    for claim in CLAIMS:
        assert claim.paper is None or claim.paper[0] < claim.paper[1]
        assert (claim.paper is None) == (ROWS[claim.worse].c4_perplexity is None)


def _results(**losses: list[float]) -> list[RowResult]:
    return [RowResult(key.replace("_", "-"), dict(enumerate(values))) for key, values in losses.items()]


def test_verdicts_are_paired_by_seed():
    seeds = [0.0, 0.5, -0.3]  # what a seed does to all rows, far more than what tells them apart
    results = _results(
        tnt_0=[2.10 + s + e for s, e in zip(seeds, (0.0, 0.01, -0.01), strict=True)],
        tnt_1=[2.00 + s for s in seeds],
        tnt_2=[2.00 + s + e for s, e in zip(seeds, (0.01, -0.02, 0.005), strict=True)],
        llama=[2.20 + s for s in seeds],
    )
    verdicts = {(v.claim.better, v.claim.worse): v for v in judge(results)}
    assert set(verdicts) == {("tnt-1", "tnt-0"), ("tnt-2", "tnt-1"), ("llama", "tnt-1")}
    assert verdicts["tnt-1", "tnt-0"].verdict == HOLDS
    assert verdicts["tnt-1", "tnt-0"].difference == pytest.approx((0.1, 0.01 / math.sqrt(3)))
    assert verdicts["tnt-2", "tnt-1"].verdict == NOISE
    assert verdicts["llama", "tnt-1"].verdict == REVERSED
    assert difference_to_base(results[3], results).value == pytest.approx(0.2)
    text = summarize(list(verdicts.values()))
    assert "can be compared here: 3; holds: 1, within noise: 1, does not hold: 1." in text
    assert "18% of cases" in text


def test_one_seed_or_a_loss_that_is_no_number_gives_no_verdict():
    for tnt_1, tnt_0 in (([2.0], [2.1]), ([2.0, 2.0], [2.1]), ([2.0, 2.0], [math.nan, 2.1])):
        (verdict,) = judge(_results(tnt_1=tnt_1, tnt_0=tnt_0))
        assert verdict.verdict == UNKNOWN


@pytest.mark.parametrize(("freedom", "chance"), [(1, 1 - 2 / math.pi * math.atan(2)), (2, 1 - 2 / math.sqrt(6))])
def test_chance_is_students(freedom: int, chance: float):
    assert chance_beyond(2.0, freedom) == pytest.approx(chance, abs=1e-6)  # in closed form for these two


def test_bytes_for_a_token_leave_out_the_ends_of_documents(smoke):
    job = smoke(seeds=1)[0]
    data = load_data(job.recipe.data, ByT5Tokenizer())
    rows = data.validation.rows(64).head(20)
    ends = sum(int((rows[i]["input_ids"][1:] == 1).sum()) for i in range(20))
    assert ends > 0
    job.folder.root.mkdir(parents=True)
    job.folder.metrics_file.write_text(json.dumps({"validation_tokens": 20 * 64}))
    assert bytes_per_token(data, job) == pytest.approx(1 - ends / (20 * 63))


def test_a_picture_of_rows_that_failed_or_are_missing(tmp_path: Path):
    results = _results(tnt_0=[2.1, 2.2], tnt_1=[2.0], tnt_2=[], tnt_3=[math.nan], stage2=[])
    results[2].failures = {0: "the loss is nan"}
    draw_table(tmp_path / "table3.png", describe_lines(results), scale="smoke")
    assert (tmp_path / "table3.png").read_bytes().startswith(b"\x89PNG")
