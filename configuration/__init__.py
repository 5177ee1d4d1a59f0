"""The configuration of TNT models: fields, validation and presets."""

from .configuration_tnt import TNTConfig
from .presets import available_presets, load_preset

__all__ = ["TNTConfig", "available_presets", "load_preset"]
