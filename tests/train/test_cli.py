"""The command itself: its help comes at once, and its errors speak of the command that was asked for."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import transformers

import modeling_tnt
from modeling_tnt.train.cli import COMMANDS, main

HELPER = """
import sys
from modeling_tnt.train.cli import main
try:
    main()
except SystemExit:
    print("loaded:", [name for name in ("torch", "transformers") if name in sys.modules])
if len(sys.argv) == 1:
    import modeling_tnt, transformers
    print(modeling_tnt.TNTConfig.model_type in transformers.CONFIG_MAPPING)
"""


@pytest.mark.parametrize("arguments", ["--help", "train --help", "--version", "train --config tnt-150m --bogus", ""])
def test_what_needs_no_model_imports_neither_torch_nor_transformers(arguments: str):
    """Run as the script `tnt`, which is told by its name."""
    code = f"import sys; sys.argv[0] = '/somewhere/bin/tnt'\n{HELPER}"
    command = [sys.executable, "-c", code, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "loaded: []" in done.stdout, done.stderr
    assert arguments or done.stdout.endswith("True\n"), "a name of the package registers its models"


def test_the_package_offers_what_it_says():
    assert all(getattr(modeling_tnt, name) is not None for name in modeling_tnt.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'TNTModle'"):
        _ = modeling_tnt.TNTModle


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    pattern = r"modeling-tnt \S+, torch {}, transformers {}, Python \S+\n"
    expected = pattern.format(re.escape(torch.__version__), re.escape(transformers.__version__))
    assert re.fullmatch(expected, capsys.readouterr().out)


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_a_misspelt_flag_gets_the_usage_of_its_command(command: str, capsys):
    places = {"eval": ["model"], "card": ["model"], "push": ["model", "user/name"]}.get(command, [])
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), *places, "--bogus-flag", "3"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith(f"usage: tnt {command} ")
    assert f"tnt {command}: error: --bogus-flag is unknown" in message
