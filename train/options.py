"""How a dataclass becomes a command: `option` fields, a parser that suggests, values back into the dataclass."""

from __future__ import annotations

import argparse
import difflib
import types
from collections.abc import Iterable
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints


def option(default: Any, group: str, help: str) -> Any:
    """A field of an arguments dataclass: its default, the group of flags that it belongs to, and its help."""
    metadata = {"group": group, "help": help}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def flag_of(name: str) -> str:
    """The flag of a field: `--max-steps` for `max_steps`."""
    return "--" + name.replace("_", "-")


def find_blocked_folder(output_dir: Path) -> Iterable[str]:
    """The problem that a file stands where the output folder, or one above it, would have to be."""
    taken = next((p for p in (output_dir, *output_dir.parents) if p.exists()), None)
    if taken is not None and not taken.is_dir():
        yield f"--output-dir {output_dir} cannot be made: {taken} is a file; give another folder"


class Parser(argparse.ArgumentParser):
    """An argument parser that answers an unknown flag with the nearest known one."""

    def parse_args(self, args: list[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.reject(unknown, parsed)
        return parsed

    def reject(self, unknown: list[str], parsed: argparse.Namespace) -> NoReturn:
        known = [flag_of(f.name) for f in fields(parsed.arguments_class)] if "arguments_class" in parsed else []
        hints = []
        for flag in (item.split("=")[0] for item in unknown if item.startswith("-")):
            near = difflib.get_close_matches(flag, known, n=1)
            hints.append(f"{flag} is unknown" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        self.error("\n  ".join(hints) or f"unexpected arguments: {' '.join(unknown)}")


def add_flags(parser: argparse.ArgumentParser, arguments_class: type) -> None:
    """Give the parser one flag for each field of a dataclass of `option`s, in groups, with defaults in the help."""
    parser.set_defaults(arguments_class=arguments_class)
    groups: dict[str, Any] = {}
    hints = get_type_hints(arguments_class)
    defaults = arguments_class()
    for f in fields(arguments_class):
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        default = getattr(defaults, f.name)
        shown = "" if default in (None, []) else f" (default: {_as_words(default)})"
        options: dict[str, Any] = {"default": default, "help": f.metadata["help"].replace("%", "%%") + shown}
        kind = hints[f.name]
        if isinstance(kind, types.UnionType):
            kind = next(k for k in get_args(kind) if k is not type(None))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = get_args(kind)[0] if get_args(kind) else kind
            options["metavar"] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}[options["type"]]
            if get_args(kind):
                options["nargs"] = "+"
        groups[group].add_argument(flag_of(f.name), **options)


def _as_words(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def to_arguments(parsed: argparse.Namespace) -> Any:
    """The arguments dataclass of the command that was given, filled with what was parsed."""
    return parsed.arguments_class(**{f.name: getattr(parsed, f.name) for f in fields(parsed.arguments_class)})
