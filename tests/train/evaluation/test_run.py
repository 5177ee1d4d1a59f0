"""`tnt eval` from saved models to files, and what it says of models, tokenizers and arguments that it cannot use."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.context_parallel import ContextParallelError
from modeling_tnt.train.common.output_folder import MANIFEST
from modeling_tnt.train.data import DataOptions, load_data
from modeling_tnt.train.evaluation import processes
from modeling_tnt.train.evaluation.arguments import TASKS, EvalArguments
from modeling_tnt.train.evaluation.position import PositionTask
from modeling_tnt.train.evaluation.run import Evaluation, choose_tasks, run_eval
from modeling_tnt.train.evaluation.subjects import find_subjects, shorten
from modeling_tnt.train.evaluation.task import Setup, Task, report_models
from modeling_tnt.train.options import Parser, add_flags, to_arguments

WORDS = "the memory reads one token and then another while it learns to forget what no longer helps".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Ten text files of about 1,000 bytes each."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(10):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(190)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The folders stage1, stage2 (other weights, smaller chunks), llama, gpt2 and titans, with ByT5's tokenizer."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    memories = {"num_heads": 2, "head_dim": 16, "global_chunk_size": 32, "local_shard_lengths": 32}
    model = TNTForCausalLM(TNTConfig(**small, **tokens, **memories, local_chunk_sizes=[8], initializer_range=0.2))
    model.save_pretrained(root / "stage1")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.set_local_chunks([2])
    model.save_pretrained(root / "stage2")
    llama = LlamaConfig(**small, **tokens, num_attention_heads=2, max_position_embeddings=100)
    LlamaForCausalLM(llama).save_pretrained(root / "llama")
    gpt2 = GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=100, **tokens)
    GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    no_local = TNTConfig(**small, **tokens, **memories | {"local_shard_lengths": None}, local_chunk_sizes=[])
    TNTForCausalLM(no_local).save_pretrained(root / "no_local")
    for folder in root.iterdir():
        ByT5Tokenizer().save_pretrained(folder)
    return root


@pytest.fixture
def arguments(models, text, tmp_path):
    """Makes arguments for quick tasks, some of them replaced."""

    def make(model: str | Path = models / "stage1", data: dict | None = None, **changed) -> EvalArguments:
        options = {"sources": [str(text)], "validation_share": 0.3, "cache_dir": tmp_path / "cache"}
        options |= {"tokenizer": "model", **(data or {})}
        small = {
            "seq_len": 64, "eval_tokens": 640, "retrieval_lengths": [64, 96], "retrieval_documents": 5, "device": "cpu",
            "output_dir": tmp_path / "eval",
        }  # fmt: skip
        return EvalArguments(model=str(model), data=DataOptions(**options), **small | changed)

    return make


def read(folder: Path, task: str) -> dict:
    return json.loads((folder / f"{task}.json").read_text())


def test_all_tasks_of_two_stages(arguments, models, tmp_path, capsys):
    given = arguments(compare=[str(models / "stage2")])
    assert run_eval(given) == 0
    out = capsys.readouterr().out
    results = {task: read(tmp_path / "eval", task) for task in ("perplexity", "position", "chunks", "retrieval")}
    for task, result in results.items():
        assert (tmp_path / "eval" / f"{task}.png").read_bytes()[:4] == b"\x89PNG"
        assert list(result["models"]) == ["stage1", "stage2"]
        assert result["sources"]["stage2"] == str(models / "stage2")
        assert result["arguments"]["data"]["validation_share"] == 0.3 and result["device"] == "cpu"
        assert f"\n{task}\n" in out

    rows = load_data(given.data, ByT5Tokenizer()).validation.rows(64).head(10)
    ids = torch.stack([row["input_ids"] for row in rows])
    for name in ("stage1", "stage2"):
        logits = AutoModelForCausalLM.from_pretrained(models / name)(ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
        whole = results["perplexity"]["models"][name]
        assert whole["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert whole["tokens"] == 630 and whole["rows"] == 10 and whole["perplexity"]["standard_error"] > 0
        curve = {point["chunk_size"]: point for point in results["chunks"]["models"][name]["curve"]}
        own = results["chunks"]["models"][name]["own_chunk_size"]
        assert own == {"stage1": 8, "stage2": 2}[name] and list(curve) == [1, 2, 4, 8, 16, 32]
        assert curve[own]["nats_per_token"] == whole["nats_per_token"]
        bins = results["position"]["models"][name]["bins"]
        mean = sum(b["tokens"] * b["nats_per_token"]["value"] for b in bins) / 630
        assert mean == pytest.approx(whole["nats_per_token"]["value"])
        lengths = results["retrieval"]["models"][name]
        assert [r["length"] for r in lengths] == [64, 96]
        assert lengths[0]["exact_match"]["trials"] == 5


@pytest.mark.slow
def test_results_are_repeated_by_the_seed_and_not_overwritten(arguments, tmp_path, capsys):
    assert run_eval(arguments(tasks=["retrieval"])) == 0
    first = read(tmp_path / "eval", "retrieval")["models"]
    assert run_eval(arguments(tasks=["retrieval"])) == 2
    assert "holds retrieval.json, retrieval.png; give another folder, or --overwrite" in capsys.readouterr().err
    assert run_eval(arguments(tasks=["retrieval"], overwrite=True)) == 0
    assert read(tmp_path / "eval", "retrieval")["models"] == first
    assert run_eval(arguments(tasks=["retrieval"], overwrite=True, seed=1)) == 0
    assert read(tmp_path / "eval", "retrieval")["models"] != first


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "no_local"])
def test_other_models_have_no_chunks(arguments, models, tmp_path, capsys, name):
    assert run_eval(arguments(models / name, retrieval_lengths=[64])) == 0
    assert "note     the task chunks is left out" in capsys.readouterr().out
    assert sorted(p.stem for p in (tmp_path / "eval").glob("*.png")) == ["perplexity", "position", "retrieval"]
    assert run_eval(arguments(models / name, tasks=["chunks"], output_dir=tmp_path / "other")) == 2
    message = capsys.readouterr().err
    assert "--tasks chunks cannot be done" in message
    assert {"no_local": "has no local memory"}.get(name, f"is a {name} model, and only TNT models") in message
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["stage1", "llama"])
def test_marked_documents(arguments, models, tmp_path, name):
    tasks = {"tasks": ["perplexity", "position"]}
    assert run_eval(arguments(models / name, data={"boundaries": "marked"}, eval_tokens=4000, **tasks)) == 0
    marked = read(tmp_path / "eval", "perplexity")["models"][name]
    # Three documents are held out of ten; two of them begin within a row, and none of the first tokens is predicted.
    assert marked["tokens"] == marked["rows"] * 63 - 2


def test_models_are_read_up_to_their_positions(arguments, models, capsys):
    assert run_eval(arguments(models / "gpt2", tasks=["retrieval"], retrieval_lengths=[])) == 2
    assert "--tasks retrieval cannot be done: no document is short enough" in capsys.readouterr().err
    assert run_eval(arguments(models / "gpt2", seq_len=128, retrieval_lengths=[64, 90])) == 2
    message = capsys.readouterr().err
    assert "--seq-len 128 is more than the 100 positions" in message
    assert "--retrieval-lengths: 90 tokens and an answer are more than the 100 positions" in message
    assert "use at most 84" in message
    assert run_eval(arguments(models / "llama", tasks=["perplexity"], seq_len=128)) == 0
    assert "was made for 100 tokens and reads up to 128 here" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- errors


def test_everything_wrong_at_once(arguments, models, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    given = arguments(
        tmp_path / "not" / "there", compare=[str(models)], tasks=["perplexty"], seq_len=1, batch_size=0, dtype="int4",
        chunk_sizes=[0], output_dir=tmp_path / "file" / "eval", data={"boundaries": "none"},
    )  # fmt: skip
    assert run_eval(given) == 2
    message = capsys.readouterr().err
    for part in (
        f"{tmp_path / 'not' / 'there'} does not exist",
        f"{models} is a folder without config.json; did you mean {models / 'gpt2'} or {models / 'llama'} or",
        "--tasks perplexty is unknown; did you mean perplexity?",
        "--seq-len must be at least 2, got 1",
        "--batch-size must be at least 1, got 0",
        "--dtype must be one of auto, fp32, bf16, fp16, got 'int4'",
        "--chunk-sizes must be at least 1, got 0",
        "cannot be made",
        "--data.boundaries must be joined or marked",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chunk_sizes": [3, 4]}, "--chunk-sizes with .*stage1: 3 must divide 32.*use 2 or 4"),
        ({"retrieval_lengths": [20]}, "--retrieval-lengths: documents of 20 tokens have no room .* at least 31"),
        ({"seq_len": 100_000}, "--seq-len 100000 is more than the .* tokens that are held out"),
        ({"device": "tpu9"}, "--device must be a device of torch"),
        ({"device": "cuda:99"}, "--device cuda:99: torch sees .* GPUs here"),
        ({"model": ""}, "model must be the folder or Hub name"),
        ({"context_parallel": 0}, "--context-parallel must be at least 1, got 0"),
        (
            {"context_parallel": 4},
            "--context-parallel 4 needs 4 processes, .*torchrun --standalone --nproc-per-node 4 .*"
            "-m modeling_tnt.train.cli eval .*stage1 --context-parallel 4",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments, capsys, changed, message):
    assert run_eval(arguments(**changed)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_processes_that_would_each_do_all_are_refused(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_eval(arguments()) == 2
    assert "2 processes were started, and --context-parallel is 1; use --context-parallel 2" in capsys.readouterr().err
    assert run_eval(arguments(context_parallel=2, device="cpu:0")) == 2
    assert "--device cpu:0 would be that of all 2 processes; leave its number out" in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


def copy_model(source: Path, to: Path, *, without: str = "") -> Path:
    to.mkdir()
    for path in source.iterdir():
        if not without or not path.name.startswith(without):
            (to / path.name).write_bytes(path.read_bytes())
    return to


def test_checkpoints_that_cannot_be_used(arguments, models, tmp_path, capsys):
    bare = copy_model(models / "stage1", tmp_path / "bare", without="tokenizer")
    for path in bare.glob("*token*"):
        path.unlink()
    assert run_eval(arguments(bare)) == 2
    assert "has no tokenizer that can be loaded; name one with --data.tokenizer, e.g. byt5" in capsys.readouterr().err
    assert run_eval(arguments(bare, data={"tokenizer": "byt5"}, tasks=["perplexity"])) == 0

    torn = copy_model(models / "stage1", tmp_path / "torn")
    weights = load_file(torn / "model.safetensors")
    removed = next(name for name in weights if name.endswith("w1"))
    del weights[removed]
    save_file(weights, torn / "model.safetensors", metadata={"format": "pt"})
    assert run_eval(arguments(torn, tasks=["perplexity"], overwrite=True)) == 2
    assert f"lacks 1 weights of TNTForCausalLM ({removed})" in capsys.readouterr().err
    (torn / "model.safetensors").write_bytes(b"half")
    assert run_eval(arguments(torn, tasks=["perplexity"], overwrite=True)) == 2
    assert "the weights of" in capsys.readouterr().err

    config = TNTConfig.from_pretrained(models / "stage1", vocab_size=300)
    small = tmp_path / "small"
    TNTForCausalLM(config).save_pretrained(small)
    assert run_eval(arguments(models / "stage1", compare=[str(small)], overwrite=True)) == 2
    assert "has 384 tokens, more than vocab_size=300" in capsys.readouterr().err

    other = copy_model(models / "stage2", tmp_path / "other")
    ByT5Tokenizer(extra_ids=100).save_pretrained(other)
    assert run_eval(arguments(compare=[str(other)], overwrite=True)) == 2
    assert f"--compare {other} has another tokenizer than" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_diverged_has_no_values(arguments, models, tmp_path, capsys):
    model = TNTForCausalLM.from_pretrained(models / "stage1")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "diverged")
    ByT5Tokenizer().save_pretrained(tmp_path / "diverged")
    assert run_eval(arguments(tmp_path / "diverged", compare=[str(models / "stage2")], chunk_sizes=[8])) == 0
    assert "diverged  perplexity nan" in capsys.readouterr().out
    both = read(tmp_path / "eval", "perplexity")["models"]
    assert both["diverged"]["perplexity"]["value"] is None and both["stage2"]["perplexity"]["value"] > 1
    assert read(tmp_path / "eval", "retrieval")["models"]["diverged"][0]["exact_match"]["value"] == 0


class CountTask(Task):
    """Counts rows, of models with local memories."""

    def prepare(self, setup: Setup) -> str | None:
        setup.remarks.append(f"rows of {setup.arguments.seq_len}")
        return None if all(s.has_local_memories for s in setup.subjects) else "there is a model without local memories"

    def measure(self, evaluation: Evaluation, label: str) -> int:
        return len(evaluation.rows)

    def report(self, results: dict[str, int]) -> dict:
        return report_models(results, int, lambda first, second: second - first)

    def describe(self, results: dict[str, int]) -> list[str]:
        return [f"{name}: {count} rows" for name, count in results.items()]

    def draw(self, path: Path, results: dict[str, int]) -> None:
        path.write_bytes(b"drawn")


def test_another_task_is_one_class_and_one_line(arguments, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[Task.__module__], "CountTask", CountTask, raising=False)
    monkeypatch.setitem(TASKS, "count", "task:CountTask")
    assert run_eval(arguments(tasks=["count"], compare=[str(models / "stage2")])) == 0
    result = read(tmp_path / "eval", "count")
    assert result["models"] == {"stage1": 10, "stage2": 10} and result["minus_first_model"] == {"stage2": 0}
    assert result["remarks"] == ["rows of 64"] and (tmp_path / "eval" / "count.png").read_bytes() == b"drawn"
    assert "\ncount\n  stage1: 10 rows\n" in capsys.readouterr().out
    assert run_eval(arguments(models / "llama", tasks=["count"], overwrite=True)) == 2
    assert "--tasks count cannot be done: there is a model without local memories" in capsys.readouterr().err


def launch(*flags: str) -> subprocess.CompletedProcess:
    """`tnt eval` in two processes, as accelerate launch starts them on several GPUs, too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "modeling_tnt.train.cli", "eval", *map(str, flags), "--context-parallel", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_write_the_results_of_one(arguments, models, text, tmp_path):
    assert run_eval(arguments(compare=[str(models / "stage2")])) == 0
    both = launch(
        models / "stage1", "--compare", models / "stage2", "--data.sources", text, "--data.validation-share", 0.3,
        "--data.cache-dir", tmp_path / "cache", "--seq-len", 64, "--eval-tokens", 640, "--retrieval-lengths", 64, 96,
        "--retrieval-documents", 5, "--device", "cpu", "--output-dir", tmp_path / "both",
    )  # fmt: skip
    assert both.returncode == 0, both.stderr
    for task in TASKS:
        assert_close(read(tmp_path / "both", task)["models"], read(tmp_path / "eval", task)["models"])
        assert (tmp_path / "both" / f"{task}.png").exists() and both.stdout.count(f"\n{task}\n") == 1
    assert "10 rows of 64 held-out tokens, each read by 2 processes, on cpu" in both.stdout


def test_what_processes_do_not_read_together_is_said(arguments, models):
    given = arguments(models / "llama", context_parallel=2)
    setup = Setup(given, find_subjects([given.model], []), ByT5Tokenizer(), [])
    choose_tasks(setup)
    assert f"{given.model} is a llama model, so each process reads its whole rows by itself" in setup.remarks
    assert "retrieval: each process reads every document by itself" in setup.remarks


def test_processes_that_accelerate_does_not_connect_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    assert run_eval(arguments(context_parallel=2, tasks=["perplexity"])) == 2
    assert "--context-parallel 2: accelerate cannot connect processes on --device cpu" in capsys.readouterr().err


def assert_close(got, want) -> None:
    """Equal but for float32 rounding."""
    if isinstance(want, dict | list):
        assert len(got) == len(want)
        for key in want if isinstance(want, dict) else range(len(want)):
            assert_close(got[key], want[key])
    else:
        assert got == (pytest.approx(want, rel=1e-4) if isinstance(want, float) else want)


def test_an_interruption_keeps_what_is_finished(arguments, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PositionTask, "measure", interrupt)
    assert run_eval(arguments()) == 130
    assert "finished tasks are kept" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == [
        "perplexity.json", "perplexity.png", MANIFEST
    ]  # fmt: skip

    def exhaust(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(PositionTask, "measure", exhaust)
    assert run_eval(arguments(overwrite=True)) == 1
    assert "out of memory; lower --batch-size" in capsys.readouterr().err

    def lose(*_):
        raise ContextParallelError("rank 1 waited for rank 0")

    monkeypatch.setattr(PositionTask, "measure", lose)
    assert run_eval(arguments(overwrite=True)) == 1
    assert "tnt eval: error: rank 1 waited for rank 0" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- flags


def test_the_command_line(capsys):
    parser = Parser()
    add_flags(parser, EvalArguments())
    flags = "--tasks chunks position --compare other --data.validation-share 0.1 --chunk-sizes 1 8".split()
    given = to_arguments(parser.parse_args(["some/model", *flags]))
    assert given.model == "some/model" and given.tasks == ["chunks", "position"] and given.compare == ["other"]
    assert given.data.validation_share == 0.1 and given.data.tokenizer == "model" and given.chunk_sizes == [1, 8]
    with pytest.raises(SystemExit):
        parser.parse_args(["--tasks", "chunks"])
    assert "the following arguments are required: MODEL" in capsys.readouterr().err


def test_short_names_of_models():
    assert shorten(["runs/a/stage1", "runs/a/stage2"]) == ["stage1", "stage2"]
    assert shorten(["runs/a/stage2", "runs/b/stage2"]) == ["a/stage2", "b/stage2"]
    assert shorten(["owner/name"]) == ["name"]


def test_the_task_lists_must_be_lists():
    with pytest.raises(TypeError, match="tasks must be a list, got str"):
        EvalArguments(model="x", tasks="chunks")
