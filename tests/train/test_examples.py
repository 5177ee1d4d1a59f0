"""The example scripts, run as a user runs them."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train import load_lora

EXAMPLES = Path(__file__).parents[2] / "train" / "examples"
SCRIPT, MEMORIZE = EXAMPLES / "finetune_stage2.py", EXAMPLES / "memorize_document.py"
USE, CLASSIFY = EXAMPLES / "use_model.py", EXAMPLES / "classify.py"
LONG = EXAMPLES / "long_sequence.py"


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Eight steps, the last four of stage 2, on a model of 30,000 parameters and 4,000 bytes."""
    torch.manual_seed(0)
    config = TNTConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=1, num_heads=2, head_dim=16, intermediate_size=32,
        global_chunk_size=32, local_chunk_sizes=[8], local_shard_lengths=32, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    TNTForCausalLM(config).save_pretrained(tmp_path / "stage1")
    ByT5Tokenizer().save_pretrained(tmp_path / "stage1")
    (tmp_path / "book.txt").write_text("the memory reads one token and then another. " * 90)
    given = {
        "--model": tmp_path / "stage1", "--text": tmp_path / "book.txt", "--output": tmp_path / "stage2",
        "--chunks": 2, "--stage1-steps": 4, "--steps": 8, "--context": 64, "--learning-rate": 1e-2,
    }  # fmt: skip
    return [str(part) for pair in given.items() for part in pair]


def run_here(monkeypatch, *arguments: str, script: Path = SCRIPT) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")


def run_in_two_processes(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("script", [SCRIPT, MEMORIZE, USE, CLASSIFY, LONG], ids=lambda path: path.stem)
def test_is_short(script):
    assert len(script.read_text().splitlines()) < 65


@pytest.mark.slow
def test_finetunes_and_saves(arguments, tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "step 4: stage 2 begins; local chunks [2], shard lengths 32" in done.stdout
    for folder, chunks in (("checkpoint-4", [8]), ("checkpoint-8", [2]), (".", [2])):
        assert TNTForCausalLM.from_pretrained(tmp_path / "stage2" / folder).config.local_chunk_sizes == chunks
    state = json.loads((tmp_path / "stage2" / "checkpoint-8" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_two_processes_equal_one(arguments, tmp_path, monkeypatch):
    """DDP over gloo on half the rows each: the swap at the same step, and the same weights but for float32 rounding."""
    run_here(monkeypatch, *arguments, "--batch-size", "4")
    expected = load_file(tmp_path / "stage2" / "model.safetensors")
    both = [*arguments, "--batch-size", "2", "--output", str(tmp_path / "both")]
    done = run_in_two_processes(SCRIPT, *both)
    assert done.stdout.count("step 4: stage 2 begins") == 1, "one process reports"
    assert TNTForCausalLM.from_pretrained(tmp_path / "both").config.local_chunk_sizes == [2]
    got = load_file(tmp_path / "both" / "model.safetensors")
    # Adam divides by the gradient's size: what differs in the last digit may differ by a part of a step of 1e-2.
    differences = {name: (tensor - got[name]).abs().max().item() for name, tensor in expected.items()}
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.slow
def test_lora_and_resuming(arguments, tmp_path, monkeypatch):
    run_here(monkeypatch, *arguments, "--lora")
    loaded = load_lora(tmp_path / "stage2")
    assert loaded.config.local_chunk_sizes == [2]
    run_here(monkeypatch, *arguments, "--lora", "--steps", "10", "--resume")
    state = json.loads((tmp_path / "stage2" / "checkpoint-10" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "stage" in entry] == [4]
    resumed = load_lora(tmp_path / "stage2")
    assert any(not torch.equal(p, q) for p, q in zip(resumed.parameters(), loaded.parameters(), strict=True))


def test_too_little_text(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_here(monkeypatch, *arguments, "--context", "5000")
    assert "book.txt has 4050 tokens, less than one row of --context 5000" in capsys.readouterr().err


def test_memorize_reads_a_text_and_reloads_what_it_saved(arguments, tmp_path, monkeypatch, capsys):
    text, output = tmp_path / "book.txt", tmp_path / "memory"
    given = ["--model", tmp_path / "stage1", "--text", text, "--output", output, "--every", 2000]
    run_here(monkeypatch, *map(str, given), script=MEMORIZE)
    printed = capsys.readouterr().out
    assert "2,000 tokens, " in printed and "4,049 tokens, " in printed
    assert "holds TNTState(tokens_read=[4049], " in printed and printed.endswith("continues in the same way\n")
    assert json.loads((output / "memory.json").read_text())["tokens_read"] == [4049]


@pytest.mark.slow
def test_two_processes_memorize_what_one_does(arguments, tmp_path, monkeypatch):
    given = ["--model", tmp_path / "stage1", "--text", tmp_path / "book.txt", "--every", 1500, "--new-tokens", 4]
    run_here(monkeypatch, *map(str, [*given, "--output", tmp_path / "one"]), script=MEMORIZE)
    done = run_in_two_processes(MEMORIZE, *map(str, [*given, "--output", tmp_path / "both"]))
    assert done.stdout.count("4,049 tokens, ") == done.stdout.count("continues in the same way\n") == 1
    states = [load_file(tmp_path / folder / "memory.safetensors") for folder in ("both", "one")]
    assert states[0].keys() == states[1].keys()
    for name, expected in states[1].items():
        # Float32 rounding of 4,049 tokens that were read in pieces of other lengths.
        torch.testing.assert_close(states[0][name], expected, rtol=1e-4, atol=1e-5)


def test_memorize_needs_no_trained_model(tmp_path, monkeypatch, capsys):
    given = ["--preset", "tiny", "--tokens", "600", "--new-tokens", "2", "--output", str(tmp_path)]
    run_here(monkeypatch, *given, script=MEMORIZE)
    assert "599 tokens, " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_here(monkeypatch, *given[:2], "--tokens", "1", *given[4:], script=MEMORIZE)
    assert "the document has 1 tokens; give at least 2" in capsys.readouterr().err


def test_a_model_is_used_streamed_in_a_batch_and_at_other_chunks(arguments, monkeypatch, capsys):
    """The first prompt, padded on the left in the batch, goes on as it did alone."""
    model = arguments[arguments.index("--model") + 1]
    given = ["--model", model, "--prompt", "the memory", "the memory reads one", "--new-tokens", "12"]
    run_here(monkeypatch, *given, "--chunks", "1", "--device", "cpu", script=USE)
    printed = capsys.readouterr().out
    streamed = printed.removeprefix("'the memory', streamed:\nthe memory").partition("\n\nall prompts as one batch")[0]
    batched, swapped = re.findall(r"chunks \[8\]:\n  'the memory' → (.+)|chunks \[1\]:\n  'the memory' → (.+)", printed)
    assert ast.literal_eval(batched[0]).strip() == streamed.strip() != ""
    assert swapped[1] and printed.count("'the memory reads one' → ") == 2


def test_a_model_is_used_without_a_trained_one(monkeypatch, capsys):
    run_here(
        monkeypatch, "--new-tokens", "2", "--temperature", "0.7", "--dtype", "bfloat16", "--device", "cpu", script=USE
    )
    assert "all prompts as one batch, chunks [16]:" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [False, True], ids=["new", "language model"])
def test_classifier_learns_the_toy_texts(arguments, tmp_path, monkeypatch, capsys, pretrained):
    """Also from the weights of a language model, whose tokenizer it saves."""
    given = ["--model", arguments[arguments.index("--model") + 1], "--learning-rate", "0.01"] if pretrained else []
    run_here(monkeypatch, "--output", str(tmp_path / "classifier"), *given, script=CLASSIFY)
    printed = capsys.readouterr().out
    assert "accuracy on texts that were held out: 100%" in printed
    assert printed.index("'label': 'good'") < printed.index("'label': 'bad'")


def test_a_long_sequence_in_two_processes():
    done = run_in_two_processes(LONG, "--tokens", "700", "--device", "cpu")
    losses = re.findall(r"loss (\d\.\d{4})", done.stdout)
    assert len(losses) == 2 and losses[0] == losses[1]
    assert "range(0, 352)" in done.stdout and "range(352, 700)" in done.stdout
    assert "after 700 tokens it goes on with" in done.stdout
