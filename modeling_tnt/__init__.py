"""TNT for Transformers: importing this package makes the Auto classes know the model type "tnt"."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .cache_file import load_cache, save_cache
from .classification import TNTForSequenceClassification
from .configuration import TNTConfig
from .configuration.version import VERSION as __version__
from .modeling import TNTForCausalLM, TNTModel, TNTPreTrainedModel
from .state import TNTState, detach_cache

AutoConfig.register("tnt", TNTConfig, exist_ok=True)
AutoModel.register(TNTConfig, TNTModel, exist_ok=True)
AutoModelForCausalLM.register(TNTConfig, TNTForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(TNTConfig, TNTForSequenceClassification, exist_ok=True)

__all__ = [
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
