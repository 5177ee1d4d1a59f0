"""YAML of somebody else: a key stands once in a mapping, of which plain YAML takes the last without a word, and aliases
do not grow into more than memory holds."""

from __future__ import annotations

from typing import Any

import yaml

LARGEST = 100_000  # values, those behind an alias counted each time


class StrictLoader(yaml.SafeLoader):
    """Raises a YAMLError for a key that stands twice, with the lines of both, and for a text that grows too large."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if not is_alias:
            inner = [] if isinstance(node, yaml.ScalarNode) else node.value
            inner = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
            self.sizes[node] = 1 + sum(self.sizes.get(part, 0) for part in inner)
            if self.sizes[node] > LARGEST:
                raise yaml.composer.ComposerError(None, None, f"more than {LARGEST:,} values", node.start_mark)
        return node

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
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name} is not valid YAML: {error}") from error
