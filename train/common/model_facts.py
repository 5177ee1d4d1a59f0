"""What the files of a saved TNT model say of it, for its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_NAME, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

import modeling_tnt
from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.hub_cards import CardFacts, find_path


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the TNT model in `folder`, or None if there is no model, or one of another kind."""
    path = folder / CONFIG_NAME
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")).get("model_type") != TNTConfig.model_type:
        return None
    return TNTConfig.from_pretrained(folder).to_dict()


def has_code(folder: Path) -> bool:
    """Whether the model in `folder` can be loaded without this package."""
    return "auto_map" in json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))


def count_parameters(config: PreTrainedConfig | dict[str, Any]) -> int:
    """Parameters of the causal language model of a configuration; of a TNT configuration as a dict, of the class that
    it names."""
    with torch.device("meta"):
        if not isinstance(config, dict):
            return AutoModelForCausalLM.from_config(config).num_parameters()
        (name, *_) = config.get("architectures") or ["TNTForCausalLM"]
        return getattr(modeling_tnt, name, TNTForCausalLM)(TNTConfig.from_dict(config)).num_parameters()


def bare_facts(folder: Path, config: dict[str, Any]) -> CardFacts:
    """What the files of a saved model say."""
    names = config.get("architectures") or [None]
    tokenizer = None
    if (folder / TOKENIZER_CONFIG_FILE).is_file():
        tokenizer = type(AutoTokenizer.from_pretrained(folder)).__name__
    return CardFacts(
        config=config, parameters=count_parameters(config), class_name=names[0], tokenizer=tokenizer,
        name=folder.resolve().name, path=find_path(folder),
    )  # fmt: skip
