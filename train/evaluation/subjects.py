"""Finding, checking and loading the models and the tokenizer of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_tnt import TNTConfig

from ..data import load_tokenizer
from .arguments import OWN_TOKENIZER

# What a configuration of rotary positions is recognised by.
ROTARY_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")


@dataclass(frozen=True)
class Subject:
    """A model by the name that the user gave, its short name in results, and its configuration."""

    source: str
    label: str
    config: PreTrainedConfig

    @property
    def is_tnt(self) -> bool:
        return isinstance(self.config, TNTConfig)

    @property
    def has_local_memories(self) -> bool:
        return self.is_tnt and len(self.config.local_chunk_sizes) > 0

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    @property
    def longest(self) -> int | None:
        """Tokens that the model was made for, if its configuration says so."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def limit(self) -> int | None:
        """Tokens that the model cannot read more of, as it has a table of positions; None: rotary positions, or none
        at all, with which it can be read beyond what it was made for."""
        text_config = self.config.get_text_config()
        rotary = any(getattr(text_config, name, None) for name in ROTARY_FIELDS)
        return None if rotary else self.longest


def find_subjects(sources: list[str], problems: list[str]) -> list[Subject]:
    """The configurations of models, with what is wrong appended to `problems`."""
    labels = shorten(sources)
    subjects = []
    for source, label in zip(sources, labels, strict=True):
        found = list(_find_wrong_folder(source))
        if not found:
            try:
                subjects.append(Subject(source, label, AutoConfig.from_pretrained(source)))
            except (OSError, ValueError) as error:
                found.append(f"{source} could not be loaded as a model: {error}")
        problems += found
    return subjects


def _find_wrong_folder(source: str) -> Iterator[str]:
    """The problem with a name that is a local path, found before transformers asks the Hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "config.json").exists():
            return
        inside = sorted(p.parent for p in path.glob("*/config.json"))
        remedy = f"did you mean {' or '.join(map(str, inside))}?" if inside else "give the folder of a saved model"
        if (path / "adapter_config.json").exists():
            remedy = "it holds a PEFT adapter; save the merged model (merge_and_unload) and give its folder"
        yield f"{source} is a folder without config.json; {remedy}"
    elif path.exists():
        yield f"{source} is a file; give the folder of a saved model, or a name on the Hub"
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        yield f"{source} does not exist; give the folder of a saved model, or a name on the Hub"


def shorten(sources: list[str]) -> list[str]:
    """The last part of each path, as many parts as are needed to tell them apart, or the whole."""
    parts = [Path(source).parts for source in sources]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return sources


def find_tokenizer(name: str, subjects: list[Subject], problems: list[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer that is named, or the first model's own, with what is wrong appended to `problems`."""
    source = subjects[0].source if name == OWN_TOKENIZER else name
    try:
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError) as error:
        if name == OWN_TOKENIZER:
            problems.append(f"{source} has no tokenizer that can be loaded; name one with --data.tokenizer, e.g. byt5")
        else:
            problems.append(str(error))
        return None
    for subject in subjects:
        if len(tokenizer) > subject.vocab_size:
            problems.append(
                f"the tokenizer of {source} has {len(tokenizer)} tokens, more than vocab_size={subject.vocab_size} of "
                f"{subject.source}; name its own with --data.tokenizer"
            )
    if name == OWN_TOKENIZER:
        problems += _find_other_tokenizers(tokenizer, subjects)
    return tokenizer


def _find_other_tokenizers(tokenizer: PreTrainedTokenizerBase, subjects: list[Subject]) -> Iterable[str]:
    """Models whose own tokenizer has another vocabulary than the first's: their losses cannot be compared."""
    for other in subjects[1:]:
        try:
            own = load_tokenizer(other.source)
        except (OSError, ValueError):
            continue  # saved without one; the size of the vocabulary has been checked
        if own.get_vocab() != tokenizer.get_vocab():
            yield (
                f"--compare {other.source} has another tokenizer than {subjects[0].source}, so their losses cannot be "
                "compared; evaluate it alone, or name one tokenizer with --data.tokenizer"
            )


def load_model(subject: Subject, device: torch.device, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model in evaluation mode.

    Raises:
        OSError: if weights are missing, or do not fit the configuration.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(subject.source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise OSError(f"the weights of {subject.source} could not be loaded: {error}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise OSError(
            f"{subject.source} lacks {len(missing)} weights of {type(model).__name__} ({shown}): a checkpoint of "
            "another architecture, or one that was not saved whole"
        )
    return model.to(device).eval()
