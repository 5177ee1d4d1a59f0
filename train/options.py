"""How a dataclass becomes a command and a YAML file: `option` fields, nested, with their checks and their flags.

A field `text_column` of a section `data` is `data: {text_column: …}` in YAML and `--data.text-column` as a flag; the
fields of an item in a list of sections are reached by the item's name: `--stages.stage2.steps`.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import math
import operator
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
NONE = "none"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
LARGEST_NUMBER = 2**53  # beyond it floats are no longer exact


def option(
    default: Any, group: str, help: str, *, positional: bool = False, alias: str | None = None,
    ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:  # fmt: skip
    """A field of an arguments dataclass.

    Args:
        default: its value when nothing is said; a list, dict or dataclass is copied for every instance.
        group: the heading that its flag stands under in the help.
        help: what it means, with its unit.
        positional: given on the command line by its place, without a flag.
        alias: a second, shorter flag.
        ge, gt, le, lt: bounds of a number, or of each number of a list; `find_broken_rules` checks them. One with a
            bound must be finite besides, and a whole one at most LARGEST_NUMBER.
        choices: the texts that are allowed.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {"group": group, "help": help, "positional": positional, "alias": alias, "choices": choices} | bounds
    if isinstance(default, list | dict) or is_dataclass(default):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def flag_of(path: str) -> str:
    """The flag of a field: `--data.text-column` for `data.text_column`."""
    return "--" + path.replace("_", "-")


def fail(command: str, error: BaseException | str, status: int) -> int:
    """Say why a command ends, and return its exit status."""
    print(f"\ntnt {command}: error: {error}", file=sys.stderr)
    return status


def find_blocked_folder(output_dir: Path, name: str = "output_dir") -> Iterable[str]:
    """The problem that a file stands where the output folder, or one above it, would have to be."""
    taken = next((p for p in (output_dir, *output_dir.parents) if p.exists()), None)
    if taken is not None and not taken.is_dir():
        yield f"{flag_of(name)} {output_dir} cannot be made: {taken} is a file; give another folder"


class Leaf(NamedTuple):
    """A field that holds a value of its own: its dotted path, what it may hold, and what it holds."""

    path: str
    hint: Any
    value: Any
    metadata: Any


def leaves(arguments: Any, prefix: str = "") -> Iterator[Leaf]:
    """The `option`s of a dataclass and of the dataclasses in it, in order."""
    hints = get_type_hints(type(arguments))
    for f in fields(arguments):
        value, path = getattr(arguments, f.name), prefix + f.name
        if is_dataclass(value):
            yield from leaves(value, path + ".")
        elif _section_of(hints[f.name]) is not None:
            for item in value:
                yield from leaves(item, f"{path}.{item.name}.")
        elif f.metadata:
            yield Leaf(path, hints[f.name], value, f.metadata)


def find_broken_rules(arguments: Any) -> Iterator[str]:
    """The rule of its `option` that a value breaks, for each one that does: flag, rule and value. None breaks none."""
    for path, _, value, metadata in leaves(arguments):
        for one in value if isinstance(value, list) else [value]:
            rule = None if one is None else _find_broken_rule(one, metadata)
            if rule is not None:
                yield f"{flag_of(path)} must be {rule}, got {one!r}"


def _find_broken_rule(value: Any, metadata: Any) -> str | None:
    choices, bounds = metadata["choices"], {name: metadata[name] for name in BOUNDS if metadata[name] is not None}
    if choices is not None and value not in choices:
        return f"one of {', '.join(choices)}"
    if not bounds:
        return None
    if isinstance(value, int):
        bounds.setdefault("le", LARGEST_NUMBER)
    elif not math.isfinite(value):
        return "finite"
    broken = (name for name, bound in bounds.items() if not getattr(operator, name)(value, bound))
    return next((f"{BOUNDS[name]} {bounds[name]}" for name in broken), None)


def _section_of(hint: Any) -> type | None:
    """The dataclass of a hint `list[SomeDataclass]`."""
    inner = get_args(hint)[0] if get_origin(hint) is list else None
    return inner if is_dataclass(inner) else None


def _assign(arguments: Any, path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        arguments = (
            next(item for item in arguments if item.name == section)
            if isinstance(arguments, list)
            else getattr(arguments, section)
        )
    setattr(arguments, name, value)


# -------------------------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """An argument parser that takes `_` for `-` in flags, and answers an unknown flag with the nearest known one."""

    def parse_args(self, args: list[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.reject(unknown, parsed)
        return parsed

    def parse_known_args(self, args: list[str] | None = None, namespace: Any = None) -> Any:
        return super().parse_known_args(args if args is None else [_with_dashes(arg) for arg in args], namespace)

    def reject(self, unknown: list[str], parsed: argparse.Namespace) -> NoReturn:
        """Ends with the usage of the command that was asked for."""
        known = list(parsed.known_flags) if "known_flags" in parsed else []
        hints = []
        for flag in (item.split("=")[0] for item in unknown if item.startswith("-")):
            hints.append(f"{flag} is unknown" + _suggestion(flag, known, "; see --help"))
        parser = parsed.parser if "parser" in parsed else self
        parser.error("\n  ".join(hints) or f"unexpected arguments: {' '.join(unknown)}")


def _with_dashes(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value


def _suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    """The nearest known name as a question; for a dotted name also one that ends like it in another section."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    tail = name.lstrip("-").split(".")[-1]
    tails = {k.lstrip("-").split(".")[-1]: k for k in reversed(known)}
    exact = [tails[tail]] if tail in tails else []
    near = exact or near or [tails[t] for t in difflib.get_close_matches(tail, tails, n=1)]
    return f"; did you mean {near[0]}?" if near else otherwise


def add_flags(parser: argparse.ArgumentParser, arguments: Any) -> None:
    """Give the parser one flag for each field of a dataclass instance, whose values are the defaults."""
    known, groups = [], {}
    for path, hint, value, metadata in leaves(arguments):
        group = metadata["group"] if path.count(".") < 2 else f"{metadata['group']}: {path.split('.')[-2]}"
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        options = _flag_options(hint, value)
        shown = "" if value in (None, [], {}) or metadata["positional"] else f" (default: {_as_words(value)})"
        options |= {"default": value, "help": metadata["help"].replace("%", "%%") + shown}
        if metadata["positional"]:
            groups[group].add_argument(path, **options | {"metavar": path.upper()})
            continue
        names = [flag_of(path), *([metadata["alias"]] if metadata["alias"] else [])]
        known += names
        groups[group].add_argument(*names, dest=path, **options)
    parser.set_defaults(arguments=arguments, known_flags=known, parser=parser)


def _flag_options(hint: Any, value: Any) -> dict[str, Any]:
    kinds, optional = _alternatives(hint)
    kind = kinds[0]
    if kind is bool and not optional:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is dict:
        return {"action": _Assignments, "nargs": "+", "metavar": "FIELD=JSON"}
    options: dict[str, Any] = {}
    if get_origin(kind) is list:
        options["nargs"] = "+"
        (kind, *_), optional = _alternatives(get_args(kind)[0])
    options["metavar"] = METAVARS.get(kind, "TEXT")
    options["type"] = _optional(kind) if optional else kind
    return options


def _alternatives(hint: Any) -> tuple[list[Any], bool]:
    """The types that a hint allows besides None, and whether it allows None."""
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        kinds = [k for k in get_args(hint) if k is not type(None)]
        return kinds, len(kinds) < len(get_args(hint))
    return [hint], False


def _optional(kind: Any) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == NONE else kind(text)

    convert.__name__ = kind.__name__  # argparse names it when a value cannot be converted
    return convert


class _Assignments(argparse.Action):
    """`field=JSON` items, merged into a dict. A value that is no JSON is taken as a string: qk_projection=none."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # noqa: ANN001 (argparse's signature)
        merged = dict(getattr(namespace, self.dest) or {})
        for item in values:
            name, equals, value = item.partition("=")
            if not equals:
                parser.error(f"{option_string} takes field=JSON, got {item!r}")
            try:
                merged[name] = json.loads(value)
            except json.JSONDecodeError:
                merged[name] = value
        setattr(namespace, self.dest, merged)


def _as_words(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}={json.dumps(v)}" for k, v in value.items())
    return " ".join(map(_as_words, value)) if isinstance(value, list) else NONE if value is None else str(value)


def to_arguments(parsed: argparse.Namespace) -> Any:
    """A copy of the dataclass that the command's flags were made from, filled with what was parsed."""
    arguments = copy.deepcopy(parsed.arguments)
    for leaf in leaves(parsed.arguments):
        _assign(arguments, leaf.path, getattr(parsed, leaf.path))
    return arguments


# ------------------------------------------------------------------------------------------------------- YAML and JSON


def from_mapping(
    cls: type, mapping: Any, name: str, problems: list[str], path: str = "", *, base: Any = None, others: Any = ()
) -> Any:
    """An instance of the dataclass `cls` from nested mappings, as YAML gives them.

    Args:
        name: what the mapping is, for messages.
        problems: every unknown key (with a suggestion) and every value of a wrong type is appended as a text.
        path: the section that is read.
        base: an instance that has what the mapping leaves out; without one, the defaults do. Of a list of sections the
            mapping gives all; each takes what it leaves out from the base's section of its name. A dict is added to the
            base's.
        others: keys that may stand in the mapping besides the fields, and are read elsewhere.
    """
    result = cls() if base is None else copy.deepcopy(base)
    if not isinstance(mapping, dict):
        problems.append(f"{name}: {path.rstrip('.') or 'it'} must be a mapping of fields, got {mapping!r}")
        return result
    hints = get_type_hints(cls)
    for key, value in mapping.items():
        if key in hints:
            below = None if base is None else getattr(base, key)
            setattr(result, key, _convert(hints[key], value, name, problems, path + key, below))
        elif key not in others:
            known = [path + field for field in (*others, *hints)]
            problems.append(f"{name}: {path}{key} is unknown" + _suggestion(f"{path}{key}", known, _choices(known)))
    return result


def _convert(hint: Any, value: Any, name: str, problems: list[str], path: str, base: Any) -> Any:
    section = _section_of(hint)
    if is_dataclass(hint):
        return from_mapping(hint, value, name, problems, path + ".", base=base)
    if section is not None:
        if not isinstance(value, list):
            problems.append(f"{name}: {path} must be a list, got {value!r}")
            return []
        below, items = {item.name: item for item in base or []}, []
        for i, item in enumerate(value):
            called = str(item.get("name", f"{section.name}{i + 1}")) if isinstance(item, dict) else None
            items.append(from_mapping(section, item, name, problems, f"{path}[{i}].", base=below.get(called)))
        return items
    kinds, optional = _alternatives(hint)
    if value is None and optional:
        return None
    for kind in kinds:
        fits, converted = _fit(kind, value)
        if fits:
            return base | converted if isinstance(base, dict) else converted
    problems.append(f"{name}: {path} must be {_words(hint)}, got {value!r}")
    return value


def _fit(kind: Any, value: Any) -> tuple[bool, Any]:
    """Whether a value can stand for `kind`, and as what. YAML 1.1 reads 3e-3 as text."""
    if get_origin(kind) is list:
        (inner, *_), optional = _alternatives(get_args(kind)[0])
        if not isinstance(value, list):
            return False, value
        items = [(True, None) if v is None and optional else _fit(inner, v) for v in value]
        return all(fits for fits, _ in items), [converted for _, converted in items]
    if get_origin(kind) is dict:
        return isinstance(value, dict), value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return True, float(value)
        except ValueError:
            return False, value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return True, value
    if kind in (str, Path) and isinstance(value, str | Path):
        return True, kind(value)
    return kind is bool and isinstance(value, bool), value


def _words(hint: Any) -> str:
    kinds, optional = _alternatives(hint)
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    words = [
        f"a list of {_words(get_args(k)[0])}" if get_origin(k) is list else names.get(k, "a mapping") for k in kinds
    ]
    return " or ".join(words + ["null"] * optional)


def _choices(known: list[str]) -> str:
    return f"; it may hold {', '.join(known)}"


def to_mapping(arguments: Any) -> dict[str, Any]:
    """Nested dicts, lists, numbers and texts, as YAML and JSON can hold them."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(arguments)
