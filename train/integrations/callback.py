"""Stage 2 under transformers' own `Trainer` (or TRL's): a callback that swaps the chunks of the local memories."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_tnt.context_parallel import refuse_ring_attention

from .lora import find_tnt_model, save_base_config


class TwoStageCallback(TrainerCallback, ExportableState):
    """Train at the model's local chunk sizes for a number of steps, and at others from there on (arXiv 2511.07343).

        Trainer(model=model, ..., callbacks=[TwoStageCallback([1], share=0.95)])

    The swap happens at the beginning of the step after `step` optimizer steps. So what is evaluated and saved at that
    step is the end of stage 1, with its chunks in `config.json`; every later checkpoint has those of stage 2. An entry
    `{"stage": 2, ...}` in `state.log_history` and a printed line say when it happened.

    Resumed runs (`resume_from_checkpoint`) go on in the stage of the checkpoint, whichever chunks the model was loaded
    with. With `load_best_model_at_end` the model gets back the chunks that the best checkpoint was scored with. The
    model may be wrapped (DDP, FSDP, torch.compile, PEFT). With PEFT a checkpoint is an adapter without a config; the
    callback adds the file that `load_lora` reads the chunks from.

    Args:
        chunk_sizes: local chunk sizes of stage 2, tokens, one for each local memory.
        shard_lengths: their shard lengths, as in `TNTPreTrainedModel.set_local_chunks`. None: those of stage 1.
        step: optimizer steps of stage 1; 0: none.
        share: the same as a share of the run's steps, 0 ≤ share < 1. Give exactly one of the two.

    Raises:
        ValueError: here for arguments that fit no model; when training begins for those that do not fit the model or
            the number of steps, a model that already has these chunks, a checkpoint that was swapped elsewhere,
            a second callback of this class, or context parallel, which the Trainer does for attention only.
        TypeError: when training begins, for a model that is no TNT model.
    """

    def __init__(
        self,
        chunk_sizes: Sequence[int],
        shard_lengths: int | Sequence[int | None] | None = None,
        *,
        step: int | None = None,
        share: float | None = None,
    ) -> None:
        if isinstance(chunk_sizes, str) or not isinstance(chunk_sizes, Sequence) or not chunk_sizes:
            raise ValueError(
                f"chunk_sizes must be a list with one int for each local memory, got {chunk_sizes!r}; use e.g. [1]"
            )
        for i, chunk in enumerate(chunk_sizes):
            if not _is_int(chunk) or chunk < 1:
                raise ValueError(f"chunk_sizes[{i}] must be an int of at least 1, got {chunk!r}; use e.g. 1")
        if (step is None) == (share is None):
            raise ValueError(f"give exactly one of step and share, got step={step!r} and share={share!r}")
        if step is not None and (not _is_int(step) or step < 0):
            raise ValueError(f"step must be an int of at least 0, got {step!r}; use share for a part of all steps")
        if share is not None and (not isinstance(share, int | float) or not 0 <= share < 1):
            raise ValueError(f"share must be a number with 0 ≤ share < 1, got {share!r}; use e.g. 0.95")
        self.chunk_sizes = list(chunk_sizes)
        self.shard_lengths = list(shard_lengths) if isinstance(shard_lengths, tuple) else shard_lengths
        self.step = step
        self.share = share
        self.swap_step: int | None = None  # known when training begins
        self.stage1: dict[str, Any] | None = None  # the config's fields that a swap replaces, as they were before
        self._config: Any = None  # of the model that stage1 was read from

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in `trainer_state.json`."""
        return {
            "args": {
                "chunk_sizes": self.chunk_sizes, "shard_lengths": self.shard_lengths,
                "step": self.step, "share": self.share,
            },
            "attributes": {"swap_step": self.swap_step, "stage1": self.stage1},
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        refuse_ring_attention()
        name = type(self).__name__
        if isinstance(state.stateful_callbacks.get(name), list):
            raise ValueError(f"callbacks must hold one {name}, got several: a run has two stages; remove the others")
        tnt = find_tnt_model(model)
        tnt.check_local_chunks(self.chunk_sizes, self.shard_lengths)
        self.swap_step = self._find_swap_step(state.max_steps)
        saved = self._read_checkpoint(state) if state.global_step > 0 else None
        if saved is not None:
            self.stage1 = saved["stage1"]
        elif self._config is not tnt.config:
            # Otherwise another attempt with this model: what the first one began with still holds.
            self.stage1 = _read_fields(tnt.config)
        self._config = tnt.config
        if state.global_step == 0 and self.swap_step > 0:
            self._refuse_nothing_to_swap()
        if state.global_step > self.swap_step:
            self._enter_stage2(tnt, state)
        else:
            self._return_to_stage1(tnt)
        # Trainer looks for it when it saves, and does not find it in a checkpoint of a run without this callback.
        state.stateful_callbacks[name] = self.state()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step == self.swap_step:
            self._enter_stage2(find_tnt_model(model), state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # Trainer has saved the config of a whole model; of an adapter's model it saves none.
        if args.should_save and (folder / "adapter_config.json").exists():
            save_base_config(model, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        best = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
        if best is not None and best <= self.swap_step < state.global_step:
            self._return_to_stage1(find_tnt_model(model))
            self._report(state, f"the best checkpoint, of step {best}, is one of stage 1", 1, self.stage1)

    # -------------------------------------------------------------------------------------------------------- steps

    def _find_swap_step(self, max_steps: int) -> int:
        if self.share is not None:
            return min(round(self.share * max_steps), max_steps - 1)
        if self.step >= max_steps:
            raise ValueError(
                f"step={self.step} must be below the run's {max_steps} steps, or stage 2 never begins; use a smaller "
                "step or share, or a larger max_steps"
            )
        return self.step

    def _read_checkpoint(self, state: TrainerState) -> dict[str, Any] | None:
        """What this callback knew when the resumed checkpoint was saved; None if it had no part in that run."""
        entry = state.stateful_callbacks.get(type(self).__name__)
        if entry is None:
            return None
        saved = entry["attributes"]
        if saved["swap_step"] != self.swap_step and state.global_step > min(saved["swap_step"], self.swap_step):
            raise ValueError(
                f"the checkpoint of step {state.global_step} comes from a run that swaps the chunks after step "
                f"{saved['swap_step']}, this one does after step {self.swap_step}; use step={saved['swap_step']}"
            )
        return saved

    def _refuse_nothing_to_swap(self) -> None:
        lengths = self.stage1["local_shard_lengths"] if self.shard_lengths is None else self.shard_lengths
        if self.stage1 == {"local_chunk_sizes": self.chunk_sizes, "local_shard_lengths": lengths}:
            raise ValueError(
                f"chunk_sizes={self.chunk_sizes} must differ from the model's own, which stage 1 is to be trained "
                "with; load the model with those of stage 1, e.g. from_pretrained(path, local_chunk_sizes=[8]), or use "
                "step=0"
            )

    def _enter_stage2(self, tnt: nn.Module, state: TrainerState) -> None:
        tnt.set_local_chunks(self.chunk_sizes, self.shard_lengths)
        if state.global_step == self.swap_step:
            self._report(state, "stage 2 begins", 2, _read_fields(tnt.config))

    def _return_to_stage1(self, tnt: nn.Module) -> None:
        # Not by set_local_chunks, for which a shard length of None means another thing.
        tnt.config.update(copy.deepcopy(self.stage1))

    def _report(self, state: TrainerState, event: str, stage: int, fields: dict[str, Any]) -> None:
        state.log_history.append({"stage": stage, **fields, "step": state.global_step})
        if state.is_world_process_zero:
            chunks, lengths = fields["local_chunk_sizes"], fields["local_shard_lengths"]
            tqdm.write(f"step {state.global_step}: {event}; local chunks {chunks}, shard lengths {lengths}")


def _read_fields(config: Any) -> dict[str, Any]:
    """The fields that a swap replaces, as lists of their own."""
    lengths = config.local_shard_lengths
    return {
        "local_chunk_sizes": list(config.local_chunk_sizes),
        "local_shard_lengths": list(lengths) if isinstance(lengths, list) else lengths,
    }


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)
