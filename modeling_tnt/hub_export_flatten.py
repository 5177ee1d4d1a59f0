"""The model's code as flat files, made from the package whenever a model is saved.

transformers copies a checkpoint's code by following `from .x import y` to `x.py` in the same folder; it follows neither
subfolders nor `..` nor `from . import x`, and it demands that all packages are installed which a file imports outside
of `try`. So every module that the model can reach becomes a file in one folder, its imports rewritten:

    modeling_tnt/modeling.py                       modeling_tnt.py
    configuration/configuration_tnt.py             configuration_tnt.py
    kernels/torch_backend/scan.py                  tnt_kernels_torch_backend_scan.py
    from ..types import FastWeights                from .tnt_kernels_types import FastWeights
    from .kernels import MemoryState               from .tnt_kernels_types import MemoryState

What only the package has stays behind, by a comment at its import:

    # package only                                 fails in a checkpoint
    # of the installed package                     comes from the package where that is installed: kernels, presets
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import NamedTuple

from .configuration.version import VERSION
from .hub_export import COPY_MARK

_PACKAGE = __package__
_ENTRIES = (f"{_PACKAGE}.configuration.configuration_tnt", f"{_PACKAGE}.modeling")
# Written at the end of modeling_tnt.py, which is where `auto_map` points to: they import it themselves.
_MODELS_BESIDE = {f"{_PACKAGE}.classification": "TNTForSequenceClassification"}
_PACKAGE_ONLY = "# package only"
_OF_THE_INSTALLED = "# of the installed package"
_TRY = """\
try:
    from {module} import {names}
except ImportError as error:
    reason = f"{names} comes with the package modeling-tnt, not with a checkpoint's code ({{error}})"
    raise ImportError(reason + "; pip install modeling-tnt") from error"""


class Change(NamedTuple):
    """Lines first to last of a source, counted from 1, become `text`."""

    first: int
    last: int
    text: str


@functools.cache
def flatten() -> dict[str, str]:
    """File name → source of every module that a model can reach."""
    files, waiting = {}, [*_ENTRIES, *_MODELS_BESIDE]
    while waiting:
        module = waiting.pop()
        name = f"{_flat_name(module)}.py"
        if name in files:
            continue
        source, used = _rewrite(module)
        files[name] = source
        waiting += used
    return dict(sorted(files.items()))


def _flat_name(module: str) -> str:
    parts = module.split(".")[1:]
    named = {_ENTRIES[0]: "configuration_tnt", _ENTRIES[1]: "modeling_tnt"}
    return named.get(module) or "_".join(["tnt", *parts])


def _rewrite(module: str) -> tuple[str, list[str]]:
    """The source of a module for a flat folder, and the modules of ours that it imports."""
    source = _source(module)
    lines, used = source.splitlines(), []
    changes = []
    for node in _imports(ast.parse(source)):
        if _PACKAGE_ONLY in lines[node.lineno - 1]:
            text = f"raise ImportError({_PACKAGE_ONLY.removeprefix('# ')!r})"
        elif _OF_THE_INSTALLED in lines[node.lineno - 1]:
            names = ", ".join(alias.name for alias in node.names)
            # In a `try`, outside of which transformers would demand that the package is installed.
            text = _TRY.format(module=_absolute(module, node), names=names)
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            origins = [(alias, *_origin(_absolute(module, node), alias.name)) for alias in node.names]
            used += [origin for _, origin, _ in origins]
            text = "\n".join(_flat_imports(origins))
        else:
            continue
        indent = " " * node.col_offset
        changes.append(Change(node.lineno, node.end_lineno, "\n".join(indent + line for line in text.split("\n"))))
    for change in sorted(changes, reverse=True):
        lines[change.first - 1 : change.last] = [change.text]
    beside = [m for m in _MODELS_BESIDE if module == _ENTRIES[1]]
    lines += [f"from .{_flat_name(m)} import {_MODELS_BESIDE[m]}" for m in beside]
    head = f"{COPY_MARK}{VERSION} (Apache-2.0), {module}, when this model was saved. Changes belong into the package."
    return "\n".join([head, *lines]) + "\n", used


def _imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module or package that `from ..x import y` in `module` names."""
    parent = module.split(".")[: -node.level]
    return ".".join([*parent, *([node.module] if node.module else [])])


def _origin(module: str, name: str) -> tuple[str, bool]:
    """Where `from module import name` comes from, through the packages that pass it on; whether it is a module."""
    if not _is_package(module):
        return module, False
    if _find(f"{module}.{name}") is not None:
        return f"{module}.{name}", True
    for node in _imports(ast.parse(_source(module))):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            # `module` is a package, so that one level means itself.
            return _origin(_absolute(f"{module}.__init__", node), name)
    raise LookupError(f"{module} does not import {name}")


def _flat_imports(origins: list[tuple[ast.alias, str, bool]]) -> Iterator[str]:
    """One statement for each module that the names come from."""
    names: dict[str, list[str]] = {}
    for alias, origin, is_module in origins:
        flat = _flat_name(origin)
        if is_module:
            # The first form is the one by which transformers finds the file.
            yield f"from .{flat} import __name__ as _"
            yield f"from . import {flat} as {alias.asname or alias.name}"
        else:
            names.setdefault(flat, []).append(f"{alias.name} as {alias.asname}" if alias.asname else alias.name)
    for flat, imported in names.items():
        line = f"from .{flat} import {', '.join(imported)}"
        yield line if len(line) <= 116 else f"from .{flat} import (\n    " + ",\n    ".join(imported) + ",\n)"


def _source(module: str) -> str:
    return _find(module).loader.get_source(module)


def _is_package(module: str) -> bool:
    return _find(module).submodule_search_locations is not None


@functools.cache
def _find(module: str) -> ModuleSpec | None:
    return importlib.util.find_spec(module)
