"""Entries in the tables of models that transformers and PEFT have, and which weights decay.

Both libraries keep tables of the models that they know. `AutoModel.register` fills other ones, which are asked for
classes and not for names; without an entry the Trainer smooths labels that nobody has shifted, and PEFT has no default
modules to adapt. No table has an entry for weight decay: the Trainer chooses by the names of parameters, where a
memory's `w1` is as good as any matrix.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto
from transformers.utils import logging

logger = logging.get_logger(__name__)

MODEL_TYPE = "tnt"
_CLASS_NAMES = {
    "MODEL_MAPPING_NAMES": "TNTModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "TNTForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "TNTForSequenceClassification",
}
# The modules of a block are called as Llama's, so that its entries in PEFT's tables are ours, but for the norms.
_PEFT_MODEL_TYPE = "llama"
_PEFT_MODULES = {"input_layernorm": "input_norm", "post_attention_layernorm": "mlp_norm"}
_MARK = "_tnt_decay"


def is_tnt_model(module: nn.Module) -> bool:
    """Whether a module is a TNT model. By method, not isinstance: remote code brings classes of its own."""
    return hasattr(type(module), "set_local_chunks")


def decaying_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that weight decay applies to: the matrices of linear maps.

    What does not decay: embeddings (and an output head tied to them), norms, biases, convolutions, and all of a memory:
    its learned initial state is where the inner optimisation starts, and its scale sets the size of the first
    gradients; its gates are linear maps whose zero is no gate but half of one. What an adapter adds to a module is as
    the module itself.
    """
    settled, decaying, embedded = {}, set(), set()
    for name, module in model.named_modules():
        above = name.rpartition(".")[0]
        if above in settled:  # a module that holds parameters itself decides for all that is inside of it
            settled[name] = settled[above]
        else:
            adapted = module
            while isinstance(getattr(adapted, "base_layer", None), nn.Module):  # PEFT's layers around a module
                adapted = adapted.base_layer
            if not any(True for _ in adapted.parameters(recurse=False)):
                continue
            settled[name] = isinstance(adapted, nn.Linear)
            if isinstance(adapted, nn.Embedding):
                embedded.add(id(adapted.weight))
        if settled[name]:
            own = module.named_parameters(recurse=False)
            decaying |= {id(parameter) for leaf, parameter in own if leaf != "bias"}
    return decaying - embedded


def _register_class_names() -> None:
    for table, class_name in _CLASS_NAMES.items():
        getattr(modeling_auto, table).setdefault(MODEL_TYPE, class_name)


def _wrap_trainer(trainer: ModuleType) -> None:
    """Let `Trainer.get_decay_parameter_names` drop those of TNT models that must not decay.

    The models have no say in it, and a subclass would reach neither TRL's trainers nor anybody else's. Models that hold
    no TNT model are none of our business: for them the answer is the original one.
    """
    original = trainer.Trainer.get_decay_parameter_names
    if hasattr(original, _MARK):  # by another copy of this code, the package or one that a checkpoint brought
        return

    @functools.wraps(original)
    def get_decay_parameter_names(self: Any, model: nn.Module) -> list[str]:
        names = original(self, model)
        spared = set()
        for tnt in filter(is_tnt_model, model.modules()):
            spared |= {id(parameter) for parameter in tnt.parameters()} - decaying_parameters(tnt)
        if not spared:
            return names
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return [name for name in names if id(parameters.get(name)) not in spared]

    setattr(get_decay_parameter_names, _MARK, True)
    trainer.Trainer.get_decay_parameter_names = get_decay_parameter_names


def _fill_peft_tables(constants: ModuleType) -> None:
    """The default modules of LoRA and of every other method that has such a table."""
    tables = {name: table for name, table in vars(constants).items() if name.endswith("_MODULES_MAPPING")}
    if not any(_PEFT_MODEL_TYPE in table for table in tables.values()):
        raise AttributeError(f"{constants.__name__} has no *_MODULES_MAPPING with {_PEFT_MODEL_TYPE!r}")
    for table in tables.values():
        if _PEFT_MODEL_TYPE in table:
            modules = [_PEFT_MODULES.get(name, name) for name in table[_PEFT_MODEL_TYPE]]
            table.setdefault(MODEL_TYPE, modules)


class _AfterImport:
    """An import hook for one module: calls `then(module)` after its first import and removes itself.

    The modules that it is for take seconds to import, and most programs never do.
    """

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.then = then
        self.asks_others = False

    def install(self) -> None:
        if self.name in sys.modules:
            self.call(importlib.import_module(self.name))  # waits for a thread that is importing it
        else:
            sys.meta_path.insert(0, self)

    def call(self, module: ModuleType) -> None:
        try:
            self.then(module)
        except Exception as error:  # what has moved in a newer version must not stop the import of it
            logger.warning(
                f"{self.name} of the installed version is not as modeling-tnt knows it ({type(error).__name__}: "
                f"{error}): {self.then.__doc__.splitlines()[0]} This was left out; install the versions that the "
                "README names, or update modeling-tnt."
            )

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name or self.asks_others:
            return None
        self.asks_others = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asks_others = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader:
    """Wraps the loader of a module and calls the hook afterwards. The module keeps its own loader."""

    def __init__(self, loader: Any, finder: _AfterImport) -> None:
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        self.finder.call(module)


_register_class_names()
_AfterImport("transformers.trainer", _wrap_trainer).install()
_AfterImport("peft.utils.constants", _fill_peft_tables).install()
