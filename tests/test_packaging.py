"""The package as a whole: who may import whom, and the folder `kernels/` beside Hugging Face's package of that name."""

import ast
import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).parents[1]
PACKAGE = "modeling_tnt"
MAY_IMPORT = {
    "kernels": set(),
    "configuration": {"kernels"},  # which kinds of memory there are
    "modeling_tnt": {"kernels", "configuration"},
    "hub_cards": {"kernels"},  # as above
    "train": {"modeling_tnt", "kernels", "configuration", "hub_cards"},
}
HUB_EXPORT = "hub_export"  # the one part of modeling_tnt that fills model cards


def imported_folders(path: Path) -> set[str]:
    """The folders of this project that a module imports from, read from its source."""
    folder, here = path.relative_to(ROOT).parts[0], path.relative_to(ROOT).with_suffix("").parts
    package = [PACKAGE, *(here[1:-1] if folder == PACKAGE else here[:-1])]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    found = set()
    for name in names:
        head, _, rest = name.partition(".")
        if head == PACKAGE:
            part = rest.split(".")[0]
            found.add(part if part in MAY_IMPORT else PACKAGE)
    return found - {folder}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_import_direction(folder):
    assert modules(folder), f"{folder}/ has no modules"
    for path in modules(folder):
        allowed = MAY_IMPORT[folder] | ({"hub_cards"} if path.stem.startswith(HUB_EXPORT) else set())
        excess = imported_folders(path) - allowed
        assert not excess, f"{path.relative_to(ROOT)} imports {sorted(excess)}; {folder} may import {sorted(allowed)}"


def test_the_import_test_reads_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "kernels" / "wrong.py"
    path.parent.mkdir()
    forms = {
        "import modeling_tnt.train.cli": "train",
        "from modeling_tnt.configuration import TNTConfig": "configuration",
        "from modeling_tnt import TNTModel": "modeling_tnt",
        "from ..hub_cards import fill": "hub_cards",
        "def f():\n    from .. import train": "train",
    }
    for source, folder in forms.items():
        path.write_text(source)
        assert folder in imported_folders(path), source
    path.write_text("from .types import MemoryState\nimport torch\nfrom . import api")
    assert imported_folders(path) == set()


def test_every_folder_is_packaged_under_its_name():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = setup["options"]["packages"].split()
    mapping = dict(line.split(" = ") for line in setup["options"]["package_dir"].strip().splitlines())
    for package, folder in mapping.items():
        assert package == folder or package == f"{PACKAGE}.{folder}"
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == set(mapping.values())
    # setuptools finds a package within a package by itself, but only one that is listed gets into the wheel.
    with_code = [
        p.parent.relative_to(ROOT) for folder in mapping.values() for p in (ROOT / folder).rglob("__init__.py")
    ]
    names = [PACKAGE if f.parts == (PACKAGE,) else ".".join((PACKAGE, *f.parts)) for f in with_code]
    assert sorted(packages) == sorted(names)


IMPORTS_FROM_ROOT = """
from transformers import LlamaForCausalLM
from transformers.integrations import hub_kernels
from transformers.utils import is_kernels_available
print(is_kernels_available())
import kernels, importlib.util
print(getattr(kernels, "__file__", None), importlib.util.find_spec("kernels") is not None)
try:
    from kernels import get_kernel
    print(get_kernel)
except ModuleNotFoundError as error:
    print(error)
from modeling_tnt.kernels import local_memory
print(local_memory.__module__)
"""


def run_from_root(code: str, *python_path: Path) -> list[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, python_path)), "USE_HUB_KERNELS": "NO"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_an_installed_kernels_package_is_not_shadowed(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from .names import answer as get_kernel\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    return object\n"
    )
    (package / "names.py").write_text("from kernels import __name__ as own_name\nanswer = 'installed ' + own_name\n")
    metadata = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")

    available, found, get_kernel, ours = run_from_root(IMPORTS_FROM_ROOT, tmp_path)
    assert available == "True"
    assert found == f"{package / '__init__.py'} True"
    assert get_kernel == "installed kernels"
    assert ours == "modeling_tnt.kernels.api"


@pytest.mark.slow
def test_without_a_kernels_package_transformers_sees_none():
    available, found, get_kernel, ours = run_from_root(IMPORTS_FROM_ROOT)
    assert available == "False"
    assert found == "None True"
    assert get_kernel.startswith("No module named 'kernels'; the folder ")
    assert ours == "modeling_tnt.kernels.api"
