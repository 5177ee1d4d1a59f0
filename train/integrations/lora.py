"""LoRA for TNT models: what PEFT adapts, what it trains as it is, and at which chunks an adapter is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.utils import cached_file

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.registration import is_tnt_model

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# The linear maps of a block that see every token: of the mixer, where g_proj is optional, and of the SwiGLU.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Not config.json: transformers takes a folder that has one for a whole model, and looks for its weights.
BASE_CONFIG_FILE = "base_config.json"


def lora_config(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    train_local_memories: bool = True,
    **options: Any,
) -> LoraConfig:
    """What `peft.get_peft_model(model, ...)` needs to fine-tune a TNT model, e.g. in stage 2.

    Every projection W of a block becomes `W + alpha/r · B A` with B A of rank r (LoRA, arXiv 2106.09685). The local
    memories, whose chunks stage 2 changes, are small; their initial weights, norms and gates are trained as they are,
    in copies that belong to the adapter.

    The memories are named one by one ("local_memories.0", …): PEFT refuses the list of them, "local_memories", in
    modules_to_save.

    Args:
        model: a TNT model, or what wraps one.
        r: rank, at least 1.
        alpha: numerator of the adapter's scale, above 0.
        dropout: share of an adapter's inputs that training drops, 0 ≤ dropout < 1.
        train_local_memories: whether the adapter has copies of the local memories.
        options: further fields of `peft.LoraConfig`, such as use_rslora; it raises TypeError for others.

    Raises:
        ImportError: without PEFT.
        TypeError: for a model that is no TNT model.
        ValueError: for numbers out of range.
    """
    peft = _import_peft()
    tnt = find_tnt_model(model)
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r must be an int of at least 1, got {r!r}; use e.g. 8")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise ValueError(f"alpha must be a number above 0, got {alpha!r}; use e.g. 2 * r")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number with 0 ≤ dropout < 1, got {dropout!r}; use e.g. 0.0")
    found = {name.rpartition(".")[2] for name, _ in tnt.named_modules()}
    memories = [f"local_memories.{i}" for i in range(len(tnt.config.local_chunk_sizes))]
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[name for name in _PROJECTIONS if name in found],
        modules_to_save=(memories or None) if train_local_memories else None,
        **options,
    )


def save_lora(model: PeftModel, folder: str | os.PathLike) -> None:
    """Save the adapter as PEFT does, and beside it the config that it was trained with: `load_lora` needs its chunks.

    Raises:
        TypeError: for a model that is not adapted, or no TNT model.
        OSError: if a file cannot be written.
    """
    if not isinstance(model, _import_peft().PeftModel):
        raise TypeError(f"model must be a PeftModel, got {type(model).__name__}; save a whole one by save_pretrained")
    model.save_pretrained(folder)
    save_base_config(model, folder)


def load_lora(path: str | os.PathLike, *, is_trainable: bool = False, **options: Any) -> PeftModel:
    """The base model that an adapter names, at the chunks that the adapter was trained with, and the adapter on it.

    `load_lora(path).merge_and_unload().save_pretrained(folder)` makes a whole model of it.

    Args:
        path: a folder of `save_lora`, a checkpoint of a Trainer with `TwoStageCallback`, or a Hub repository of either.
        is_trainable: whether to go on training the adapter.
        options: passed to the base model's `from_pretrained`, such as dtype.

    Raises:
        ImportError: without PEFT.
        OSError: if something is not there; for an adapter without the config, load the base model at the chunks that
            you know, and `peft.PeftModel.from_pretrained(base, path)`.
    """
    peft = _import_peft()
    adapter = peft.PeftConfig.from_pretrained(path)
    config = read_base_config(path)
    base = TNTForCausalLM.from_pretrained(adapter.base_model_name_or_path, config=config, **options)
    return peft.PeftModel.from_pretrained(base, path, is_trainable=is_trainable)


def save_base_config(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the config of the TNT model inside of `model` to where `load_lora` reads it."""
    find_tnt_model(model).config.to_json_file(Path(folder) / BASE_CONFIG_FILE)


def read_base_config(path: str | os.PathLike) -> TNTConfig:
    """What `save_base_config` wrote to a folder, or what is in a Hub repository. OSError if it is not there."""
    return TNTConfig.from_json_file(cached_file(path, BASE_CONFIG_FILE))


def find_tnt_model(model: nn.Module) -> nn.Module:
    """The TNT model inside of whatever wraps it (DDP, FSDP, torch.compile, PEFT); the one with a head if it has one.

    Raises TypeError if there is none.
    """
    for module in model.modules():
        if is_tnt_model(module):
            return module
    raise TypeError(
        f"the model must be a TNT model, such as TNTForCausalLM, or wrap one; got {type(model).__name__}, which has no "
        "local memories"
    )


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        remedy = "use pip install 'modeling-tnt[lora]'"
        raise ImportError(f"LoRA needs the package peft, which is not installed; {remedy}") from error
    return peft
