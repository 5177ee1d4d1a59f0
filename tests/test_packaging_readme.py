"""What the README says is true: its two first commands, its preset table, its links into the code."""

import ast
import re
from pathlib import Path

import pytest
import torch

from modeling_tnt import TNTForCausalLM
from modeling_tnt.configuration import TNTConfig, available_presets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_two_commands_which_ci_reads_from_here():
    commands = [block.strip() for block in blocks("bash") if ".venv/bin/pip" in block]
    assert len(commands) == 2
    assert all("\n" not in command for command in commands)
    assert commands[0].endswith(".venv/bin/tnt train")
    assert commands[1].endswith(".venv/bin/python -m pytest -q -n 2 --dist loadscope")
    prefix = re.search(r"grep '\^(.*?)' README.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8")).group(1)
    assert [line for line in README.splitlines() if line.startswith(prefix)] == commands


@pytest.mark.parametrize("preset", available_presets())
def test_preset_table(preset):
    row = re.search(rf"^\| `{preset}` \|(.*)\|$", README, flags=re.MULTILINE)
    assert row, f"the README's table has no row for {preset}"
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
    assert local == f"{', '.join(map(str, config.local_chunk_sizes))}, {resets}"


def test_versions_that_were_tested_are_those_of_the_constraints():
    sentence = re.search(r"Tested on 2[\d-]+ with (.*?)\s\(.*?transformers (\S+), the oldest", README, flags=re.DOTALL)
    tested = re.findall(r"(\w+) (\d[\d.]*\d)", sentence[1])
    assert len(tested) == 6
    for name, version in tested:
        assert re.search(rf"^{name}=={re.escape(version)}\b", CONSTRAINTS, flags=re.MULTILINE), f"{name} {version}"
    assert f"transformers>={sentence[2]}\n" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


@pytest.mark.parametrize("page, names", [("README.md", 0), ("train/README.md", 0), ("kernels/README.md", 20)])
def test_links_and_names_into_the_code_exist(page: str, names: int):
    """At least so many names, so that a change of their form is seen."""
    folder, text = (ROOT / page).parent, (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (folder / target).exists(), target
    references = re.findall(r"\[`(\w+)\.(?!py`)([\w.]+)`\]\(([\w/.]+\.py)\)", text)
    assert len(references) >= names
    for module, name, path in references:
        assert Path(path).stem == module, f"{module}.{name} is linked to {path}"
        scope: ast.AST = ast.parse((folder / path).read_text(encoding="utf-8"))
        for part in name.split("."):
            defined = {n.name: n for n in scope.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            assert part in defined, f"{path} defines no {name}"
            scope = defined[part]
