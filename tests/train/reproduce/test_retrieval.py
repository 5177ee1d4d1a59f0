"""`tnt reproduce retrieval`: its text, its models, and what it says of their answers."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from modeling_tnt.train.cli import main, parse
from modeling_tnt.train.common.model_facts import count_parameters
from modeling_tnt.train.common.models import make_llama_config
from modeling_tnt.train.data import load_tokenizer
from modeling_tnt.train.evaluation.needles import NeedleFactory
from modeling_tnt.train.reproduce import runs as runs_module
from modeling_tnt.train.reproduce.retrieval import jobs as jobs_module
from modeling_tnt.train.reproduce.retrieval.arguments import ROWS, RetrievalArguments
from modeling_tnt.train.reproduce.retrieval.jobs import eval_command, make_jobs
from modeling_tnt.train.reproduce.retrieval.text import PAIRS_OF_A_DOCUMENT, draw_texts, write_texts


def test_text_has_the_lines_of_the_task_again_and_again(tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    write_texts(path, 0.02)
    written = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    drawn = draw_texts(random.Random(0))
    assert written == [next(drawn) for _ in written] and 20_000 <= sum(map(len, written)) < 21_000
    for text in written:
        counts = Counter(text.splitlines())
        assert len(counts) in PAIRS_OF_A_DOCUMENT and sum(counts.values()) == 3 * len(counts) + 8
        assert len({line.split(" = ")[0] for line in counts}) == len(counts), "a key has one value"
    needle = NeedleFactory(load_tokenizer("byt5"), 0).make(64, 1)[0]
    assert len(needle.answer) == len(" 1234") and len(written[0].splitlines()[0]) == len("abcd = 1234")


def test_models_have_equal_tokens_and_about_equal_parameters(tmp_path: Path):
    arguments = RetrievalArguments(output_dir=tmp_path, device="cpu").resolve()
    jobs = make_jobs(arguments)
    assert [(job.row, job.seed) for job in jobs] == [(row, seed) for seed in (0, 1) for row in ROWS]
    assert len({job.steps for job in jobs}) == 1 and all(job.recipe.problems() == [] for job in jobs)
    sizes = {}
    for job in jobs[: len(ROWS)]:
        config = make_llama_config(job.config, arguments.seq_len) if job.row == "llama" else job.config
        sizes[job.row] = count_parameters(config)
    # A Llama's width goes in steps of 64, each a tenth of this model: half of one at most.
    assert all(abs(size / sizes["memory"] - 1) < (0.05 if row == "llama" else 0.01) for row, size in sizes.items()), (
        sizes
    )
    attending = {job.row: job.config.attention_types for job in jobs[: len(ROWS)]}
    assert attending == {
        "memory": [], "hybrid": ["full_attention"], "mag": ["sliding_attention"], "mal": ["sliding_attention"],
        "mac": ["segment_attention"], "llama": [],
    }  # fmt: skip


def test_flags_of_the_evaluation_are_those_of_tnt_eval(tmp_path: Path):
    arguments = RetrievalArguments(output_dir=tmp_path, device="cpu", retrieval_lengths=[128, 64]).resolve()
    job = make_jobs(arguments)[0]
    _, *words = eval_command(arguments, job)
    assert words[:2] == ["-m", "modeling_tnt.train.cli"]
    command, parsed = parse(words[2:])
    assert command.name == "eval" and parsed.tasks == ["retrieval"] and parsed.retrieval_lengths == [64, 128]
    assert parsed.data.sources == job.recipe.data.sources and parsed.model == str(job.folder.root / "trained")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0", "--seeds", "-1"], ["--steps must be at least 1", "--seeds must be at least 1"]),
        (["--device", "tpu"], ["--device must be cuda or cpu, got 'tpu'"]),
        (["--rows", "mamba"], ["--rows must be one of llama, memory, hybrid, mag, mal, mac, got"]),
        (["--seq-len", "100", "--retrieval-lengths", "0"], ["--retrieval-lengths must be at least 1, got"]),
    ],
)
def test_arguments_that_cannot_be_used_are_named_together(flags, words, tmp_path: Path, capsys):
    assert main(["reproduce", "retrieval", "--output-dir", str(tmp_path / "r"), *flags]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "r").exists()


FAKE_TRAINER = """
import json, pathlib, sys, yaml
recipe = yaml.safe_load(open(sys.argv[1]))
if recipe["training"]["seed"] == 1 and recipe["model"]["architecture"] == "llama":
    sys.exit("tnt train: error: the loss is nan")
folder = pathlib.Path(recipe["output"]["dir"])
folder.mkdir(parents=True, exist_ok=True)
metrics = {"validation_bits_per_byte": {"after_trained": 2.0 + recipe["training"]["seed"]}, "parameters": 1000}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""
FAKE_EVAL = """
import json, pathlib, sys
file, lengths, documents, *right = sys.argv[1:]
found = [{"length": n, "chance": 1 / 4, "exact_match": {"value": float(right[0])}, "nats_of_answer": {"value": 3.0}}
         for n in json.loads(lengths)]
arguments = {"retrieval_lengths": json.loads(lengths), "retrieval_documents": int(documents)}
pathlib.Path(file).parent.mkdir(parents=True)
with open(file, "x") as f:  # fails where a run is measured twice
    json.dump({"arguments": arguments, "models": {"m": found}}, f)
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch) -> None:
    """Trainings and evaluations that take no time: seed 0 answers nothing, seed 1 everything, its Llama fails."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    scripts = {"train": FAKE_TRAINER, "eval": FAKE_EVAL}
    for name, script in scripts.items():
        (tmp_path / f"{name}.py").write_text(script)

    def fake_eval(arguments, job):  # noqa: ANN001, ANN202
        file = jobs_module.results_of(arguments, job)
        lengths, documents = json.dumps(arguments.retrieval_lengths), str(arguments.retrieval_documents)
        return [sys.executable, str(tmp_path / "eval.py"), str(file), lengths, documents, str(job.seed)]

    monkeypatch.setattr(
        runs_module, "trainer_command", lambda recipe: [sys.executable, str(tmp_path / "train.py"), str(recipe)]
    )
    monkeypatch.setattr(jobs_module, "eval_command", fake_eval)


def _run(folder: Path, *more: str) -> int:
    flags = ["--megabytes", "0.01", "--seq-len", "64", "--device", "cpu", "--workers", "2", *more]
    return main(["reproduce", "retrieval", "--output-dir", str(folder), *flags])


def test_the_report_has_means_over_seeds_and_what_is_missing(fakes, tmp_path: Path, capsys):
    folder = tmp_path / "r"
    flags = ["--rows", "llama", "mac", "--retrieval-lengths", "64", "128"]
    assert _run(folder, *flags) == 1
    assert "1 runs failed; 1 of 4 runs are left; the same command goes on" in capsys.readouterr().err
    text = (folder / "retrieval.md").read_text()
    assert "| MAC | 1,000 | 2.50 ± 0.50 | 50% ± 50 | 50% ± 50 |" in text
    assert "| full attention alone (Llama) (1 of 2 seeds) | 1,000 | 2.00 | 0% | 0% |" in text
    assert "| chance | – | – | 25% | 25% |" in text and "| ln of the pairs | – | – | 1.39 | 1.39 |" in text
    assert "- llama-seed1: the loss is nan" in text
    assert "`tnt reproduce retrieval --seq-len 64 --megabytes 0.01 --rows llama mac --retrieval-lengths 64 128`" in text
    record = json.loads((folder / "retrieval.json").read_text())
    assert record["rows"]["mac"]["exact_match"] == {"64": [0.0, 1.0], "128": [0.0, 1.0]}
    assert record["not_finished"] == ["llama-seed1: the loss is nan"]

    texts = next(folder.glob("texts-*.jsonl"))
    written = texts.stat().st_mtime_ns
    assert _run(folder, *flags) == 1, "what is finished is neither trained nor measured again"
    assert texts.stat().st_mtime_ns == written


def test_a_folder_with_files_of_ones_own_is_refused(fakes, tmp_path: Path, capsys):
    (tmp_path / "retrieval.md").write_text("mine")
    assert _run(tmp_path) == 2
    assert "holds retrieval.md under names that tnt reproduce retrieval writes" in capsys.readouterr().err
    assert (tmp_path / "retrieval.md").read_text() == "mine"
