"""TNT for Transformers: importing this package makes the Auto classes know the model type "tnt"."""

import sys
from importlib import import_module
from pathlib import Path

__all__ = [  # noqa: F822 (of `auto`, see __getattr__)
    "TNTConfig",
    "TNTForCausalLM",
    "TNTForSequenceClassification",
    "TNTModel",
    "TNTPreTrainedModel",
    "TNTState",
    "__version__",
    "detach_cache",
    "load_cache",
    "save_cache",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".auto", __name__), name)


# The `tnt` command imports `auto` itself, once it knows what to do: its help does not wait seconds for torch.
if Path((getattr(sys, "argv", None) or [""])[0]).name not in ("tnt", "tnt.exe"):
    import_module(".auto", __name__)
