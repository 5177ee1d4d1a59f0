"""The model's code as flat files, made from the package whenever a model is saved.

transformers copies a checkpoint's code by following `from .x import y` to `x.py` in the same folder; it follows neither
subfolders nor `..` nor `from . import x`, and it demands that all packages are installed which a file imports outside
of `try`. So the modules that the model can reach become files in one folder, their imports rewritten:

    modeling_tnt/modeling.py                       modeling_tnt.py
    configuration/*.py                             configuration_tnt.py
    kernels/types.py                               tnt_kernels_types.py
    kernels/torch_backend/*.py                     tnt_kernels_torch_backend.py
    from ..types import FastWeights                from .tnt_kernels_types import FastWeights
    from .kernels import MemoryState               from .tnt_kernels_types import MemoryState

The modules of `configuration` and of a folder inside of `kernels` are joined to one file, each behind those that it
imports. One in which a name means something else than in those before it keeps a file of its own.

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

from .configuration.version import VERSION
from .hub_export import COPY_MARK

_PACKAGE = __package__
_ENTRIES = (f"{_PACKAGE}.configuration.configuration_tnt", f"{_PACKAGE}.modeling")
# Written at the end of modeling_tnt.py, which is where `auto_map` points to: they import it themselves.
_MODELS_BESIDE = {f"{_PACKAGE}.classification": "TNTForSequenceClassification"}
_PACKAGE_ONLY = "# package only"
_OF_THE_INSTALLED = "# of the installed package"
_HEAD = f"{COPY_MARK}{VERSION} (Apache-2.0) when this model was saved. Changes belong into the package.\n"
_FUTURE = "from __future__ import annotations"
_TRY = """\
try:
    from {module} import {names}
except ImportError as error:
    reason = f"{names} comes with the package modeling-tnt, not with a checkpoint's code ({{error}})"
    raise ImportError(reason + "; pip install modeling-tnt") from error"""


@functools.cache
def flatten() -> dict[str, str]:
    """File name → source of every module that a model can reach."""
    modules = _reachable()
    places = _places(modules)
    parts: dict[str, list[str]] = {}
    for module in modules:
        parts.setdefault(f"{places[module]}.py", []).append(_rewrite(module, places))
    return {name: _HEAD + _joined(parts[name]) for name in sorted(parts)}


def _reachable() -> list[str]:
    """Every module that a model can reach, those that it imports before it."""
    found: dict[str, None] = {}
    begun = set()

    def visit(module: str) -> None:
        if module in begun:
            return
        begun.add(module)
        for _, origins in _own_imports(module):
            for _, origin, _ in origins:
                visit(origin)
        found[module] = None

    for module in (*_ENTRIES, *_MODELS_BESIDE):
        visit(module)
    return list(found)


def _places(modules: list[str]) -> dict[str, str]:
    """The file of each module, without its ending."""
    places: dict[str, str] = {}
    meanings: dict[str, dict[str, str]] = {}
    for module in modules:
        own = _meanings(module)
        place = _flat_name(_folder(module) or module)
        before = meanings.setdefault(place, {})
        if any(before.get(name, meaning) != meaning for name, meaning in own.items()):
            place = _flat_name(module)
        else:
            before.update(own)
        places[module] = place
    return places


def _folder(module: str) -> str | None:
    """What a module is joined to, if anything."""
    _, part, *inner = module.split(".")
    if part == "configuration":
        return _ENTRIES[0]
    return module.rpartition(".")[0] if part == "kernels" and len(inner) == 2 else None


def _meanings(module: str) -> dict[str, str]:
    """What each name on the top level of a module stands for: where it comes from."""
    meanings = {
        alias.asname or alias.name: f"{origin}:{alias.name}"
        for _, origins in _own_imports(module)
        for alias, origin, _ in origins
    }
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            outside = getattr(node, "module", "")
            names = {alias.asname or alias.name: f"{outside}:{alias.name}" for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = {node.name: f"{module}:{node.name}"}
        else:
            targets = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
            names = {n.id: f"{module}:{n.id}" for n in targets}
        meanings = names | meanings
    return meanings


def _flat_name(module: str) -> str:
    parts = module.split(".")[1:]
    named = {_ENTRIES[0]: "configuration_tnt", _ENTRIES[1]: "modeling_tnt"}
    return named.get(module) or "_".join(["tnt", *parts])


def _own_imports(module: str) -> Iterator[tuple[ast.ImportFrom, list[tuple[ast.alias, str, bool]]]]:
    """The imports of modules of ours that a checkpoint has, with the origins of their names."""
    lines = _source(module).splitlines()
    for node in _imports(ast.parse(_source(module))):
        left_behind = any(mark in lines[node.lineno - 1] for mark in (_PACKAGE_ONLY, _OF_THE_INSTALLED))
        if isinstance(node, ast.ImportFrom) and node.level > 0 and not left_behind:
            yield node, [(alias, *_origin(_absolute(module, node), alias.name)) for alias in node.names]


def _rewrite(module: str, places: dict[str, str]) -> str:
    """The source of a module for a flat folder."""
    lines = _source(module).splitlines()
    changes = []
    for node in _imports(ast.parse(_source(module))):
        if _PACKAGE_ONLY in lines[node.lineno - 1]:
            changes.append((node, f"raise ImportError({_PACKAGE_ONLY.removeprefix('# ')!r})"))
        elif _OF_THE_INSTALLED in lines[node.lineno - 1]:
            names = ", ".join(alias.name for alias in node.names)
            # In a `try`, outside of which transformers would demand that the package is installed.
            changes.append((node, _TRY.format(module=_absolute(module, node), names=names)))
    for node, origins in _own_imports(module):
        names = [(alias, places[origin], is_module) for alias, origin, is_module in origins]
        changes.append((node, "\n".join(_flat_imports(names, places[module])) or ("pass" if node.col_offset else "")))
    for node, text in sorted(changes, key=lambda change: change[0].lineno, reverse=True):
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in text.split("\n") if line]
    beside = [m for m in _MODELS_BESIDE if module == _ENTRIES[1]]
    lines += [f"from .{places[m]} import {_MODELS_BESIDE[m]}" for m in beside]
    return "\n".join([f"# {module}", *lines]) + "\n"


def _joined(parts: list[str]) -> str:
    """The parts of a file, `from __future__` in front of them all."""
    if len(parts) == 1:
        return parts[0]
    rest = [part.replace(f"{_FUTURE}\n\n", "", 1) for part in parts]
    return "\n\n".join([f"{_FUTURE}\n", *rest])


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


def _flat_imports(names: list[tuple[ast.alias, str, bool]], here: str) -> Iterator[str]:
    """One statement for each file that the names come from; those of the file `here` are there already."""
    from_file: dict[str, list[str]] = {}
    for alias, flat, is_module in names:
        if is_module:
            # The first form is the one by which transformers finds the file.
            yield f"from .{flat} import __name__ as _"
            yield f"from . import {flat} as {alias.asname or alias.name}"
        elif flat == here:
            if alias.asname:
                yield f"{alias.asname} = {alias.name}"
        else:
            from_file.setdefault(flat, []).append(f"{alias.name} as {alias.asname}" if alias.asname else alias.name)
    for flat, imported in from_file.items():
        line = f"from .{flat} import {', '.join(imported)}"
        yield line if len(line) <= 116 else f"from .{flat} import (\n    " + ",\n    ".join(imported) + ",\n)"


def _source(module: str) -> str:
    return _find(module).loader.get_source(module)


def _is_package(module: str) -> bool:
    return _find(module).submodule_search_locations is not None


@functools.cache
def _find(module: str) -> ModuleSpec | None:
    return importlib.util.find_spec(module)
