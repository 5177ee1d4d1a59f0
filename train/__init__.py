"""Two-stage training of TNT models: data, trainer, evaluation and the `tnt` command.

For training elsewhere: `TwoStageCallback` for transformers' Trainer; `lora_config`, `save_lora`, `load_lora` for PEFT.
"""

from importlib import import_module

# Loaded when asked for: transformers' Trainer alone takes longer to import than the `tnt` command to print its help.
_HOMES = {
    "TwoStageCallback": ".integrations.callback",
    "load_lora": ".integrations.lora",
    "lora_config": ".integrations.lora",
    "save_lora": ".integrations.lora",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
