"""YAML in which a key stands once in a mapping; plain YAML lets the last one win without a word."""

from __future__ import annotations

from typing import Any

import yaml


class StrictLoader(yaml.SafeLoader):
    """Raises a YAMLError with the lines of both for a key that stands twice."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            first = seen.setdefault((key.tag, key.value), key)
            if first is not key:
                line = first.start_mark.line + 1
                raise yaml.composer.ComposerError(
                    None, None, f"duplicate key {key.value!r}, first in line {line}; remove one", key.start_mark
                )
        return node


def load_yaml(data: bytes, name: str) -> Any:
    """What a file of YAML holds. Raises ValueError that says its name and the line."""
    try:
        loader = StrictLoader(data.decode("utf-8-sig"))
        loader.name = name  # of the file, for the message
        return loader.get_single_data()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {error}") from error
