"""What the package offers by name, and the registration of its models with transformers' Auto classes as type "tnt"."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .cache_file import load_cache as load_cache
from .cache_file import save_cache as save_cache
from .classification import TNTForSequenceClassification
from .configuration import TNTConfig
from .configuration.version import VERSION as __version__  # noqa: F401
from .modeling import TNTForCausalLM, TNTModel
from .modeling import TNTPreTrainedModel as TNTPreTrainedModel
from .state import TNTState as TNTState
from .state import detach_cache as detach_cache

AutoConfig.register("tnt", TNTConfig, exist_ok=True)
AutoModel.register(TNTConfig, TNTModel, exist_ok=True)
AutoModelForCausalLM.register(TNTConfig, TNTForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(TNTConfig, TNTForSequenceClassification, exist_ok=True)
