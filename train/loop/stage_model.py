"""The model of a stage: built, loaded or resumed, with the stage's chunks and the parameters that it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from modeling_tnt import TNTForCausalLM, TNTPreTrainedModel

from ..integrations.lora import lora_config, save_base_config
from ..plan import Run


def build_model(run: Run, stage_index: int) -> PreTrainedModel:
    """The weights that a stage begins with, in float32 on the CPU, at the stage's chunk sizes.

    Raises OSError for a checkpoint that cannot be read, ValueError for one whose weights are not those of the model.
    """
    stage, start_from = run.stages[stage_index], run.recipe.model.start_from
    if stage_index > 0:
        model = _load(str(run.folder.stage(run.stages[stage_index - 1].name)))
    elif start_from is not None:
        model = _load(start_from, config=run.config)
    elif run.recipe.model.architecture == "llama":
        model = LlamaForCausalLM(run.config)
    else:
        model = TNTForCausalLM(run.config)
    if isinstance(model, TNTPreTrainedModel) and stage.local_chunk_sizes:
        model.set_local_chunks(stage.local_chunk_sizes, stage.local_shard_lengths)
    return model


def resume_model(run: Run, stage_index: int, checkpoint: Path) -> PreTrainedModel:
    """The model of a checkpoint that was saved in the middle of a stage, ready to be trained."""
    if run.stages[stage_index].trainable != "lora":
        return choose_trained(run, stage_index, _load(str(checkpoint)))
    from peft import PeftModel

    return PeftModel.from_pretrained(build_model(run, stage_index), checkpoint, is_trainable=True)


def choose_trained(run: Run, stage_index: int, model: PreTrainedModel) -> PreTrainedModel:
    """Freeze what the stage does not train; with LoRA, the model with adapters."""
    stage = run.stages[stage_index]
    if stage.trainable == "local":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("local_memories" in name)
    if stage.trainable == "lora":
        from peft import get_peft_model

        return get_peft_model(model, lora_config(model, r=stage.lora_rank, alpha=2 * stage.lora_rank))
    return model


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside of PEFT's, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save_checkpoint_model(folder: Path, run: Run, model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """The model as a checkpoint has it: itself, or with LoRA its adapter alone."""
    model.save_pretrained(folder, state_dict=weights)
    run.tokenizer.save_pretrained(folder)


def save_whole_model(
    folder: Path, run: Run, stage_index: int, model: PreTrainedModel, weights: dict[str, Tensor]
) -> None:
    """The model as others load it: adapters are merged, and saved in `adapter/` besides."""
    if run.stages[stage_index].trainable == "lora":
        model.save_pretrained(folder / "adapter", state_dict=weights)
        save_base_config(model, folder / "adapter")
        # Merged in a copy: the one that is trained may be sharded, and goes on training.
        copy = choose_trained(run, stage_index, build_model(run, stage_index))
        copy.load_state_dict(weights)
        copy.merge_and_unload().save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=weights)
    run.tokenizer.save_pretrained(folder)


def _load(name: str, **options: Any) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    wrong = [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"the checkpoint {name} does not hold the weights of its model: {len(wrong)} are missing or of another "
            f"shape, e.g. {wrong[0]}; a changed model.override may be the cause"
        )
    return model
