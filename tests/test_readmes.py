"""What the README.md files say is true: commands, Python, links, the preset table, the versions that were tested.

Commands and Python are run as somebody who follows the pages runs them: the root page first, and each of the others
from the folder and the Python names that the root page leaves.
"""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from torch.distributed.run import get_args_parser

from modeling_tnt import TNTForCausalLM
from modeling_tnt.configuration import TNTConfig, available_presets
from modeling_tnt.kernels.memories import kinds
from modeling_tnt.train.cli import main, parse

ROOT = Path(__file__).parents[1]
FOLDERS = ("configuration", "hub_cards", "kernels", "modeling_tnt", "tests", "train")
PAGES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("README.md")]
PAGES = ["README.md", *sorted(PAGES)]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}

FAST = '.venv/bin/python -m pytest -q -n 2 --dist loadscope -m "not slow"'

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
    "tnt reproduce retrieval": "--rows memory --seeds 1 --megabytes 0.01 --device cpu --time-limit 1e-9",
    "tnt bench": NO_TIME,
    "tnt bench decode": "--device cpu --contexts 16 --read 16 --case-seconds 0.01",
    "tnt bench decode --preset tnt-150m": f"{NO_TIME} --contexts 16 --overwrite",
    "python train/examples/share_model.py": "",
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
    "accelerate launch": "needs several GPUs",
    "torchrun --nproc-per-node 2 train/examples/long_sequence.py": "tests/train/test_examples.py does it",
    "torchrun": "tests/train/loop/test_distributed.py does it, in half a minute",
    "python tests/benchmarks/aot.py": "ten minutes; test_aot.py runs parts of it",
    "python tests/benchmarks/make_pictures.py": "ten minutes; it runs commands that have tests of their own",
    "python tests/benchmarks/predict.py": "minutes; test_predict.py runs parts of it",
    "python tests/kernels/emulated_grid.py": "a quarter of an hour; test_emulated_kernels.py runs a part",
}


# What a page must leave in the folder, and what it must have printed.
LEFT = {
    "README.md": ["runs/quickstart/loss.png", "my-model/model.safetensors"],
    "hub_cards/README.md": ["runs/quickstart/stage2/README.md"],
    "modeling_tnt/README.md": ["memory.safetensors", "book-memory/memory.safetensors"],
    "train/README.md": [
        "runs/mine/ones/model.safetensors",
        "runs/variant/narrow/model.safetensors",
        "my-stage2/model.safetensors",
        "my-merged-model/model.safetensors",
    ],
    "train/evaluation/README.md": ["runs/eval/position.png"],
    "train/reproduce/README.md": ["runs/table3-smoke/table3.json"],
}
PRINTED = {"modeling_tnt/README.md": "200 tokens read", "train/README.md": "resumed  from"}


class Block(NamedTuple):
    language: str
    text: str


def read_blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    blocks, lines = [], iter(TEXTS[page].splitlines())
    for line in lines:
        if line.startswith("```"):
            blocks.append(Block(line[3:], "\n".join(iter(lambda: next(lines), "```"))))
    return blocks


def bash_blocks(page: str) -> list[str]:
    return [text for language, text in read_blocks(page) if language == "bash"]


def test_two_commands_which_ci_reads_from_here():
    commands = [block for block in bash_blocks("README.md") if ".venv/bin/pip" in block]
    assert len(commands) == 2
    assert all("\n" not in command for command in commands)
    assert commands[0].endswith(".venv/bin/tnt train")
    assert commands[1].endswith(".venv/bin/python -m pytest -q -n 2 --dist loadscope")
    prefix = re.search(r"grep '\^(.*?)' README.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8")).group(1)
    assert [line for line in TEXTS["README.md"].splitlines() if line.startswith(prefix)] == commands


def test_the_command_of_the_fast_set(pytestconfig: pytest.Config):
    assert FAST in bash_blocks("README.md") and FAST in bash_blocks("tests/README.md")
    assert any(marker.startswith("slow:") for marker in pytestconfig.getini("markers"))


@pytest.mark.parametrize("preset", available_presets())
def test_preset_table(preset: str):
    row = re.search(rf"^\| `{preset}` \|(.*)\|$", TEXTS["configuration/README.md"], flags=re.MULTILINE)
    assert row, f"the table of presets has no row for {preset}"
    parameters, size, memory, global_chunk, local, _ = (cell.strip() for cell in row.group(1).split("|"))
    config = TNTConfig.from_preset(preset)
    with torch.device("meta"):
        count = TNTForCausalLM(config).num_parameters()
    assert parameters == (f"{count / 1e6:.2f} M" if count < 1e7 else f"{count / 1e6:.0f} M")
    assert size == f"{config.num_hidden_layers} × {config.hidden_size}, {config.num_heads}"
    inner = [config.head_dim * config.memory_expansion] if config.memory_type == "mlp" else []
    widths = " → ".join(map(str, [config.head_dim, *inner, config.head_dim]))
    assert memory == f"{'MLP' if inner else 'linear'}, {widths}"
    assert global_chunk == ("–" if config.global_chunk_size is None else str(config.global_chunk_size))
    resets = "never" if config.local_shard_lengths is None else f"{config.local_shard_lengths} tokens"
    chunks = config.local_chunk_sizes
    assert local == (f"{', '.join(map(str, chunks))}, {resets}" if chunks else "–")


@pytest.mark.parametrize("base", ["tiny", "tnt-150m", "titans-150m"])
def test_presets_with_attention_are_as_large_as_those_without(base: str):
    kin = {"tiny": "tiny-", "tnt-150m": "tnt-hybrid", "titans-150m": "titans-m"}[base]
    with torch.device("meta"):
        sizes = {name: TNTForCausalLM(TNTConfig.from_preset(name)).num_parameters()
                 for name in available_presets() if name == base or name.startswith(kin)}  # fmt: skip
    assert len(sizes) > 1
    for name, size in sizes.items():
        assert size == pytest.approx(sizes[base], rel=0.01), name


def test_every_recipe_is_named():
    text = TEXTS["configuration/README.md"]
    named = {*re.findall(r"`([\w-]+)`", text), *(f"table3-{n}-memories" for n in range(5)), "table3-1-memory"}
    assert {path.stem for path in (ROOT / "configuration" / "recipes").glob("*.yaml")} <= named


def test_versions_that_were_tested_are_those_of_the_constraints():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    sentence = re.search(
        r"Tested on 2[\d-]+ with (.*?)\s\(.*?transformers (\S+), the oldest", TEXTS["README.md"], re.DOTALL
    )
    tested = re.findall(r"(\w+) (\d[\d.]*\d)", sentence[1])
    assert len(tested) == 6
    for name, version in tested:
        assert re.search(rf"^{name}=={re.escape(version)}\b", constraints, flags=re.MULTILINE), f"{name} {version}"
    assert f"transformers>={sentence[2]}\n" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


def linked_files(page: str) -> list[tuple[Path, str]]:
    """The file or folder of each link within the repository, and its anchor or nothing."""
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", TEXTS[page])
    here = ROOT / page
    return [
        ((here.parent / target).resolve() if target else here, anchor)
        for target, anchor in links
        if not target.startswith("https://")
    ]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_into_the_code_exist(page: str):
    for target, anchor in linked_files(page):
        assert target.exists(), target
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], anchor
    references = re.findall(r"\[`(\w+)\.(?!py`)([\w.]+)`\]\(([\w/.]+\.py)\)", TEXTS[page])
    assert len(references) >= {"kernels/README.md": 20}.get(page, 0)  # so that a change of their form is seen
    for module, name, path in references:
        assert Path(path).stem == module, f"{module}.{name} is linked to {path}"
        scope: ast.AST = ast.parse(((ROOT / page).parent / path).read_text(encoding="utf-8"))
        for part in name.split("."):
            defined = {n.name: n for n in scope.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            assert part in defined, f"{path} defines no {name}"
            scope = defined[part]


def test_links_lead_from_the_root_to_every_page():
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        near = {target.relative_to(ROOT).as_posix() for target, _ in linked_files(page)}
        waiting += sorted((near & set(PAGES)) - reached)
    assert reached == set(PAGES)


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
    commands = [words for page in PAGES for text in bash_blocks(page) for words in split_commands(text)]
    assert len(commands) > 20
    assert {find_entry(words) for words in commands} == {*SHORT, *NOT_RUN}


def check_flags(words: list[str]) -> None:
    """Read the flags of a command that is not run."""
    if words[0] in ("accelerate", "torchrun"):
        launcher = launch_command_parser() if words[0] == "accelerate" else get_args_parser()
        read = launcher.parse_args(words[2:] if words[0] == "accelerate" else words[1:])
        if not read.module:
            check_flags(["python", read.training_script, *read.training_script_args])
            return
        command = {"modeling_tnt.train": ["train"], "modeling_tnt.train.cli": []}[read.training_script]
        _, arguments = parse([*command, *read.training_script_args])
        if words[0] == "accelerate" and read.config_file:
            assert load_config_from_file(read.config_file).num_processes == 8
        elif not command:
            processes = read.num_processes if words[0] == "accelerate" else int(read.nproc_per_node)
            assert processes == arguments.context_parallel
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


def make_clone(folder: Path) -> None:
    """What commands name of a clone, and what the pages take for the user's own."""
    for name in ("train", "tests", "configuration"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my-texts").mkdir()
    for i in range(8):
        (folder / "my-texts" / f"{i}.txt").write_text(f"text {i}: the memory reads one token after another. " * 20)
    (folder / "book.txt").write_text("the memory reads one token and then another. " * 20)
    (folder / "tasks").mkdir()
    (folder / "questions.jsonl").write_text('{"question": "the sky is", "answers": ["blue", "iron"], "right": 0}\n')
    task = {
        "task": "choice", "dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "questions.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{answers}}", "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "tasks" / "choice.yaml").write_text(yaml.safe_dump(task))


def follow(page: str, folder: Path, names: dict[str, Any]) -> None:
    """Do in `folder` what a page says, with the Python names that there are; its own are added."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr(kinds, "_KINDS", dict(kinds._KINDS))  # a page registers a kind of memory
        patch.chdir(folder)
        for language, text in read_blocks(page):
            if language == "python":
                exec(compile(text, page, "exec"), names)
            elif language == "yaml":
                Path(text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
            for words in split_commands(text) if language == "bash" else []:
                entry = find_entry(words)
                if entry in NOT_RUN:
                    check_flags(words)
                else:
                    run([*(OFFLINE.get(word, word) for word in words), *shlex.split(SHORT[entry])], patch)
    for result in LEFT.get(page, []):
        assert (folder / result).stat().st_size > 0


@pytest.fixture(scope="module")
def after_the_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder and the Python names when the root page has been followed."""
    folder, names = tmp_path_factory.mktemp("root"), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make_clone(folder)
    follow("README.md", folder, names)
    yield folder, names
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_the_root_page_can_be_followed(after_the_root: tuple[Path, dict[str, Any]]):
    _, names = after_the_root
    assert names["model"].config.local_chunk_sizes == [1]
    assert names["state"].tokens_read.tolist() == [1400]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if read_blocks(page)])
def test_a_page_can_be_followed_behind_the_root(
    page: str, after_the_root: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture
):
    if page == "train/README.md":
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra eval")
    folder, names = after_the_root
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    follow(page, tmp_path, dict(names))
    assert PRINTED.get(page, "") in capsys.readouterr().out
