"""TNT for Transformers: importing this package makes the Auto classes know the model type "tnt"."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_file import load_cache, save_cache
from .configuration import TNTConfig
from .configuration.version import VERSION as __version__
from .modeling import TNTForCausalLM, TNTModel, TNTPreTrainedModel
from .state import TNTState

AutoConfig.register("tnt", TNTConfig, exist_ok=True)
AutoModel.register(TNTConfig, TNTModel, exist_ok=True)
AutoModelForCausalLM.register(TNTConfig, TNTForCausalLM, exist_ok=True)

__all__ = [
    "TNTConfig",
    "TNTForCausalLM",
    "TNTModel",
    "TNTPreTrainedModel",
    "TNTState",
    "__version__",
    "load_cache",
    "save_cache",
]
