"""Every command and all Python of a README, in order and in one folder, as somebody who follows it runs them."""

from __future__ import annotations

import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from torch.distributed.run import get_args_parser

from modeling_tnt.train.cli import main, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "train/README.md", "kernels/README.md")]

MODEL = (
    "--model.override num_hidden_layers=1 hidden_size=32 num_heads=2 head_dim=16 intermediate_size=64 "
    "global_chunk_size=32 local_chunk_sizes=[16] local_shard_lengths=64"
)
DATA = "--data.cache-dir cache --data.validation-share 0.3 --data.limit-megabytes 0.05"
RUN = (
    f"{MODEL} {DATA} --training.seq-len 64 --output.eval-tokens 64 --output.prompt-tokens 8 --output.sample-tokens 4 "
    "--output.health-every 2"
)
VARIANT = f"{RUN} --stages.wide.steps 2 --training.batch-size 2 --training.micro-batch-size 1"
MINE = f"{VARIANT} --stages.ones.tokens 64"
EVAL = f"{DATA} --seq-len 64 --eval-tokens 64 --device cpu --retrieval-documents 1 --retrieval-lengths 48"
TABLE = "--scale smoke --rows tnt-0 --seeds 1 --no-speed --time-limit 1e-9 --device cpu --override"
TABLE += " 'data.cache_dir=\"cache\"' data.validation_share=0.3 data.limit_megabytes=0.05"
HARNESS = "--include_path tasks --device cpu --batch_size 2"
OFFLINE = {"lambada_openai": "choice", "lambada_openai,arc_easy": "choice"}  # tasks of the harness to download
OURS = "--only ours --length 64 --shard-length 64 --batch 1 --no-peak --repeats 1"
NO_TIME = "--device cpu --time-limit 1e-9"  # with it no measurement is begun

# By how a command begins, without .venv/bin/, the flags that make it short.
SHORT = {
    "tnt train": f"{RUN} --stages.stage1.steps 4",
    "tnt train --config my-recipe.yaml": MINE,
    "tnt train --config my-variant.yaml": VARIANT,
    "tnt eval": EVAL,
    "tnt card": "",
    "tnt push": "",
    "tnt reproduce table3": TABLE,
    "tnt bench": NO_TIME,
    "tnt bench decode": "--device cpu --contexts 16 --read 16 --case-seconds 0.01",
    "tnt bench decode --preset tnt-150m": f"{NO_TIME} --contexts 16 --overwrite",
    "python train/examples/use_model.py": "--new-tokens 2 --device cpu",
    "python train/examples/memorize_document.py": "--tokens 600 --new-tokens 2",
    "python train/examples/finetune_stage2.py": "--steps 2 --context 64 --batch-size 1",
    "python -m modeling_tnt.train.harness": HARNESS,
    "python tests/benchmarks/bench_memory.py": OURS,
}
# The same for what is not run: why, and what reads its flags instead.
NOT_RUN = {
    "python3 -m venv": "the first step of .ci/run",
    "pip install": "the first step of .ci/run",
    "python -m pytest": "these tests",
    "accelerate launch": "needs 8 GPUs",
    "torchrun": "tests/train/loop/test_distributed.py does it, in half a minute",
}


class Block(NamedTuple):
    language: str
    text: str


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    blocks, lines = [], iter(page.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith("```"):
            blocks.append(Block(line[3:], "\n".join(iter(lambda: next(lines), "```"))))
    return blocks


def split_commands(text: str) -> list[list[str]]:
    """The words of each command, without the environment's folder and variables set before it."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line), "&&"]:
            if word == "&&":
                commands.append(words)
                words = []
            elif words or "=" not in word:
                words.append(word.removeprefix(".venv/bin/"))
    return commands


def find_entry(words: list[str]) -> str:
    """The longest beginning of a command that a table knows."""
    known = [entry for entry in (*SHORT, *NOT_RUN) if words[: len(entry.split())] == entry.split()]
    assert known, f"no table says how {shlex.join(words)} is tested"
    return max(known, key=len)


def test_every_command_has_an_entry_and_every_entry_a_command():
    blocks = [block for page in PAGES for block in read_blocks(page) if block.language == "bash"]
    commands = [words for block in blocks for words in split_commands(block.text)]
    assert len(commands) > 20
    folders = ("configuration", "hub_cards", "kernels", "modeling_tnt", "tests", "train")
    others = [path for folder in folders for path in (ROOT / folder).rglob("README.md") if path not in PAGES]
    assert not any("```bash" in path.read_text(encoding="utf-8") for path in others), "the commands of more READMEs"
    assert {find_entry(words) for words in commands} == {*SHORT, *NOT_RUN}


def check_flags(words: list[str]) -> None:
    """Read the flags of a command that is not run."""
    if words[0] in ("accelerate", "torchrun"):
        launcher = launch_command_parser() if words[0] == "accelerate" else get_args_parser()
        read = launcher.parse_args(words[2:] if words[0] == "accelerate" else words[1:])
        assert read.module and read.training_script == "modeling_tnt.train"
        parse(["train", *read.training_script_args])
        if words[0] == "accelerate":
            assert load_config_from_file(read.config_file).num_processes == 8
    elif words[0] == "python" and words[1].endswith(".py"):
        source = Path(words[1]).read_text(encoding="utf-8")
        assert all(f'"{flag}"' in source for flag in words if flag.startswith("--"))


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # each is a process of its own to a user
    if words[0] == "tnt":
        assert main(words[1:]) == 0
    elif words[1] == "-m":
        from modeling_tnt.train.harness import cli_evaluate

        monkeypatch.setattr(sys, "argv", words[2:])
        cli_evaluate()
    else:
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A clone, as far as commands name its files, and what the README takes for the user's own."""
    for name in ("train", "tests", "configuration"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my-texts").mkdir()
    for i in range(8):
        (tmp_path / "my-texts" / f"{i}.txt").write_text(f"text {i}: the memory reads one token after another. " * 20)
    (tmp_path / "book.txt").write_text("the memory reads one token and then another. " * 20)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "questions.jsonl").write_text('{"question": "the sky is", "answers": ["blue", "iron"], "right": 0}\n')
    task = {
        "task": "choice", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "questions.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{answers}}", "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "tasks" / "choice.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


# What following a page prints and leaves.
LEFT = {
    "README.md": ("200 tokens read", ["runs/quickstart/loss.png", "runs/eval/position.png",
                                      "runs/quickstart/stage2/README.md"]),
    "train/README.md": ("resumed  from", ["runs/mine/ones/model.safetensors", "runs/variant/narrow/model.safetensors",
                                          "my-stage2/model.safetensors", "my-merged-model/model.safetensors"]),
    "kernels/README.md": ("", []),
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=LEFT)
def test_a_readme_can_be_followed(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra eval")
    torch.manual_seed(0)
    names: dict = {}
    for language, text in read_blocks(page):
        if language == "python":
            exec(compile(text, "README", "exec"), names)
        elif language == "yaml":
            Path(text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
        for words in split_commands(text) if language == "bash" else []:
            entry = find_entry(words)
            if entry in NOT_RUN:
                check_flags(words)
            else:
                run([*(OFFLINE.get(word, word) for word in words), *shlex.split(SHORT[entry])], monkeypatch)
    printed, files = LEFT[page.relative_to(ROOT).as_posix()]
    assert printed in capsys.readouterr().out
    assert all((folder / name).stat().st_size > 0 for name in files)
