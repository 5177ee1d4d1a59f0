"""Training in stages (TNT, arXiv 2511.07343, section 4), from a checked plan to a folder of results.

Stage 1 trains with large chunks, which is fast; stage 2 goes on from its model with smaller local chunks, which are
accurate. Read `train`, then `Session.train_stage` and `Session.take_step`. Everything that a resumed run needs to go on
as if it had never stopped is in `State` and in the tensors saved beside it (`saving`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from modeling_tnt import TNTPreTrainedModel
from modeling_tnt.compat import enable_checkpointing
from modeling_tnt.health import memory_health

from ..common.errors import (
    NonFiniteError,
    OutOfMemory,
    ProcessLost,
    TrainingStopped,
    explain_lost_process,
    explain_out_of_memory,
    is_lost_process,
    is_out_of_memory,
)
from ..common.utilisation import operations_per_token, peak_operations
from ..data import RowOrder
from ..hub.cards import finish_cards
from ..hub.push_run import RunPusher
from ..options import leaves, to_mapping
from ..plan import Run, Stage
from ..recipe import LARGEST_SEED
from .batches import StepBatches
from .distributed import clip_gradients, context_mesh, sum_over_groups, unsharded, without_gradient_sync, wrap
from .optim import FUSED_DEVICES, learning_rate_at, parameter_groups
from .report import Log, Progress, Reporting, print_start, save_results
from .saving import Checkpoint, Saver
from .scoring import generate_final_sample, score_bigrams, score_validation
from .signals import Stopper
from .stage_model import build_model, choose_trained, without_adapters
from .state import Score, State, score_key

TRACKERS = "reporting to the trackers"


def train(run: Run, accelerator: Accelerator) -> dict[str, Any]:
    """Train all stages, evaluate, and save everything under `output.dir`. Returns what `metrics.json` holds.

    With `output.resume` a run goes on from its newest readable checkpoint, or begins when there is none.

    Raises:
        NonFiniteError: names the step and the last checkpoint, which is kept.
        OutOfMemory: says what to lower.
        ProcessLost: another process has ended, or takes longer than processes wait for each other.
        TrainingStopped: after SIGTERM or Ctrl-C, once a checkpoint of the last whole step is saved.
        OSError: when something cannot be saved or loaded, or another run is writing; what was saved before is kept.
        ValueError: when no checkpoint is whole, or a user's files came in the way since `prepare`.
        PushError: when all is done and saved, but could not be pushed (`output.push_to_hub`).
    """
    with Stopper() as stopper:
        session = Session(run, accelerator, stopper)
        try:
            return session.run_stages()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise OutOfMemory(explain_out_of_memory(error, run)) from error
            if is_lost_process(error):
                raise ProcessLost(f"{explain_lost_process(error)}; {session.saver.kept()}") from error
            raise


class Session:
    """One process's part in a run: the plan, where it stands, and where it writes."""

    def __init__(self, run: Run, accelerator: Accelerator, stopper: Stopper):
        self.run, self.accelerator, self.stopper = run, accelerator, stopper
        self.recipe = run.recipe
        self.began = time.perf_counter()
        self.reporting = Reporting()
        self.saver = Saver(run, accelerator, self.reporting)
        self.pusher = RunPusher(self.recipe.output)
        self.state, self.stop_requested = State(), False
        self.autocast = torch.bfloat16 if self.recipe.training.mixed_precision == "bf16" else None
        shared = run.layout.context_size > 1
        self.context = context_mesh(accelerator, run.layout) if shared else None  # the processes that share its rows
        self.tokens_per_byte = run.data.train.num_tokens / max(1, run.data.train.num_bytes)

    def run_stages(self) -> dict[str, Any]:
        with self.saver.hold_folder():
            return self._run_stages(self.saver.open_run())

    def _run_stages(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        if checkpoint is not None:
            self.state = checkpoint.state
        if self.recipe.output.trackers:
            self.reporting(TRACKERS, self._start_trackers)
        with Log(self.run.folder.log_file, keep_bytes=self.state.log_bytes, active=self.is_main) as self.log:
            if not self.state.scores:
                self.state.scores += score_bigrams(self.run)
            for index in range(self.state.stage, len(self.run.stages)):
                resumed = checkpoint if checkpoint is not None and index == self.state.stage else None
                model = self.start_stage(index, resumed)
                self.train_stage(self.run.stages[index], model, resumed)
        self.accelerator.wait_for_everyone()
        results = None
        if self.is_main:
            device = self.accelerator.device
            sample = self.reporting("the sample", generate_final_sample, self.run, device, otherwise=("", ""))
            seconds = self.state.earlier_seconds + time.perf_counter() - self.began
            results = save_results(self.run, self.state, sample, self.reporting, seconds=seconds)
            self.reporting("the model cards", finish_cards, self.run, self.state, seconds=seconds)
        self.reporting("closing the trackers", self.accelerator.end_training)
        if self.is_main:  # the other processes are done, and wait for nothing
            last = self.run.stages[-1].name
            self.pusher.push_end(self.run.folder.stage(last), f"{last}, {self.state.total_steps} steps in all")
        return results or {}

    def _start_trackers(self) -> None:
        flat = {leaf.path: to_mapping(leaf.value) for leaf in leaves(self.recipe)}
        self.accelerator.init_trackers(
            "tnt", {k: v if isinstance(v, int | float | str) else str(v) for k, v in flat.items()}
        )

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    # ---------------------------------------------------------------------------------------------------------- stages

    def start_stage(self, index: int, resumed: Checkpoint | None) -> PreTrainedModel:
        """The stage's model on this process's device."""
        # The same everywhere: adapters are drawn here, and each process keeps its own part of them under FSDP.
        set_seed((self.recipe.training.seed + index) % (LARGEST_SEED + 1))
        if resumed is None:
            if index > self.state.stage:
                self.state.begin_stage(index)
            model = choose_trained(self.run, index, build_model(self.run, index))
        else:
            model = resumed.load_model()
        if self.recipe.training.gradient_checkpointing:
            enable_checkpointing(model)
        model = model.to(self.accelerator.device)
        if self.context is not None:
            without_adapters(model).enable_context_parallel(self.context)
        if self.recipe.training.compile:
            model.compile()
        if self.is_main and (resumed is not None or index == 0):
            print_start(self.run, model, self.accelerator, None if resumed is None else resumed.path)
        return model

    def train_stage(self, stage: Stage, model: PreTrainedModel, resumed: Checkpoint | None) -> None:
        """Train `model` to the end of the stage, with checkpoints, and score it."""
        state, training = self.state, self.recipe.training
        wrapped = wrap(model, self.accelerator, training.sharding)
        optimizer = self._make_optimizer(wrapped, stage)
        if resumed is not None:
            resumed.load_training_state(model, optimizer)
        if state.stage > 0 and state.step == 0:
            before = self.run.stages[state.stage - 1].name
            self.score(wrapped, score_key(before, at=stage.name), f"after {before}", stage)
        wrapped.train()
        steps = self._read_steps(stage)
        utilisation = self._utilisation(model, stage)
        with Progress(stage, state, active=self.is_main, device=self.accelerator.device) as progress:
            while state.step < stage.steps:
                began = time.perf_counter()
                batches = next(steps)
                nats, gradient_norm = self.take_step(wrapped, optimizer, stage, batches)
                state.count_step(training.batch_size * stage.seq_len, time.perf_counter() - began)
                state.losses = [*state.losses[-19:], nats / math.log(2) * self.tokens_per_byte]
                self._report_step(stage, progress, nats, gradient_norm, utilisation)
                self._look_around(stage, wrapped, model, optimizer, batches)
        self.finish_stage(stage, wrapped, model)

    def finish_stage(self, stage: Stage, wrapped: nn.Module, model: PreTrainedModel) -> None:
        """Score the stage's model and keep it."""
        score = self.score(wrapped, score_key(stage.name), f"after {stage.name}", stage)
        self.saver.save_best(self.state, model, score)
        self.state.stages.append(self.state.figures(stage))
        self.saver.save_stage(self.state, model, score)

    def _make_optimizer(self, wrapped: nn.Module, stage: Stage) -> AdamW:
        options = self.recipe.optimizer
        groups = parameter_groups(wrapped, options.weight_decay)
        fused = self.accelerator.device.type in FUSED_DEVICES
        return AdamW(groups, lr=stage.learning_rate, betas=(options.beta1, options.beta2), fused=fused)

    def _read_steps(self, stage: Stage) -> Iterator[list[dict[str, Tensor]]]:
        """For each step left in the stage this process's batches, in the order of the passes that they are for."""
        training, tokens = self.recipe.training, self.run.data.train
        rows = tokens.rows(stage.seq_len, self.recipe.data.boundaries)
        done = self.state.step * training.batch_size
        order = RowOrder(
            tokens.num_tokens, seq_len=stage.seq_len, block_len=self.run.block_len, seed=training.seed,
            start_tokens=stage.start_tokens + done * stage.seq_len, num_rows=stage.steps * training.batch_size - done,
        )  # fmt: skip
        micro_batch_size, layout = self.run.micro_batch_size, self.run.layout
        passes = training.batch_size // (micro_batch_size * layout.data_size)
        batches = StepBatches(
            order, batch_size=training.batch_size, micro_batch_size=micro_batch_size, layout=layout
        )  # fmt: skip
        on_gpu = self.accelerator.device.type == "cuda"
        loader = iter(
            DataLoader(
                rows, batch_sampler=batches, num_workers=training.data_workers, pin_memory=on_gpu,
                # Its own: drawn from the global one, the seed of its workers would shift a resumed run's numbers.
                generator=torch.Generator().manual_seed(training.seed),
            )
        )  # fmt: skip
        for _ in range(self.state.step, stage.steps):
            taken = [next(loader) for _ in range(passes)]
            yield [{k: v.to(self.accelerator.device, non_blocking=True) for k, v in batch.items()} for batch in taken]

    # ----------------------------------------------------------------------------------------------------------- steps

    def take_step(
        self, wrapped: nn.Module, optimizer: AdamW, stage: Stage, batches: list[dict[str, Tensor]]
    ) -> tuple[float, float]:
        """One step of the optimizer. Returns the loss in nats per predicted token, over all processes, and the norm of
        its gradient before clipping."""
        device, layout = self.accelerator.device, self.run.layout
        own = float(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
        (predicted,) = sum_over_groups([own], layout, device)
        nats = 0.0
        for i, batch in enumerate(batches):
            # DDP and FSDP average gradients over processes, which is the mean over groups, since a group's own mean is
            # the gradient of its loss: so each group's loss counts as often as there are groups.
            if i + 1 < len(batches):
                with without_gradient_sync(wrapped):
                    nats += self._backward(wrapped, batch, predicted / layout.data_size)
            else:
                nats += self._backward(wrapped, batch, predicted / layout.data_size)
        total, stop = sum_over_groups([nats, float(self.stopper.signal is not None)], layout, device)
        loss = self._finite(total / layout.data_size, "loss", stage)
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        norm = clip_gradients(parameters, self.recipe.optimizer.max_grad_norm)
        norm = self._finite(float(norm), "gradient norm", stage)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(stage, self.state.step)
        optimizer.step()
        optimizer.zero_grad()
        self.stop_requested = stop > 0
        return loss, norm

    def _backward(self, wrapped: nn.Module, batch: dict[str, Tensor], predicted: float) -> float:
        with torch.autocast(self.accelerator.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss = wrapped(**batch, num_items_in_batch=predicted, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    def _finite(self, number: float, name: str, stage: Stage) -> float:
        if not math.isfinite(number):
            raise NonFiniteError(
                f"the {name} is {number} at step {self.state.step + 1} of {stage.name}, before the weights were "
                f"changed; {self.saver.kept()}. Try a smaller --optimizer.learning-rate"
            )
        return number

    def _report_step(
        self, stage: Stage, progress: Progress, nats: float, gradient_norm: float, utilisation: tuple[float, float]
    ) -> None:
        state, (operations, peak) = self.state, utilisation
        speed = state.tokens_per_second
        used = speed * operations / peak if peak else None
        rate = learning_rate_at(stage, state.step - 1)
        progress.show(state, gradient_norm, used)
        values = {
            "loss_nats_per_token": nats, "bits_per_byte": state.losses[-1], "gradient_norm": gradient_norm,
            "learning_rate": rate, "tokens_per_second": speed,
        } | ({} if used is None else {"model_flops_utilisation": used})  # fmt: skip
        self.record("step", stage, values | {"seconds": state.stage_seconds})

    def _look_around(
        self, stage: Stage, wrapped: nn.Module, model: PreTrainedModel, optimizer: AdamW,
        batches: list[dict[str, Tensor]],
    ) -> None:  # fmt: skip
        """What is done between steps: health, validation, checkpoints, and a stop that was asked for."""
        state, output = self.state, self.recipe.output
        last = state.step == stage.steps
        if state.step % output.health_every == 0 or last:
            self._look_at_health(stage, wrapped, model, batches[0]["input_ids"][:1])
        if output.eval_every is not None and state.step % output.eval_every == 0 and not last:
            self.saver.save_best(state, model, self.score(wrapped, None, f"step {state.step}", stage))
        if state.step % output.checkpoint_every == 0 or last or self.stop_requested:
            seconds = time.perf_counter() - self.began
            state.log_bytes = self.log.size()
            self.saver.save_checkpoint(state, model, optimizer, seconds=seconds)
            if self.is_main and not self.stop_requested:
                message = f"{stage.name}, step {state.step}"
                self.reporting("the push of a checkpoint", self.pusher.push_checkpoint, self.saver.newest, message)
        if self.stop_requested:
            raise TrainingStopped(
                f"stopped in {stage.name} at step {state.step}; {self.saver.kept()}. --output.resume goes on from it",
                self.stopper.signal,
            )

    def _look_at_health(self, stage: Stage, wrapped: nn.Module, model: PreTrainedModel, input_ids: Tensor) -> None:
        inner = without_adapters(model)
        if not isinstance(inner, TNTPreTrainedModel):
            return
        # Each process by itself, so no more tokens than the memory of one was made for.
        length = math.ceil(input_ids.shape[1] / self.run.layout.context_size)
        with unsharded(wrapped), inner.pause_context_parallel():
            health = memory_health(inner, input_ids[:, :length])
        self.record("memory_health", stage, health)

    def _utilisation(self, model: PreTrainedModel, stage: Stage) -> tuple[float, float]:
        """Operations per token, and what all devices together could do in a second (0: not known)."""
        peak = peak_operations(self.accelerator.device)
        inner = without_adapters(model)
        return operations_per_token(inner, stage.seq_len), (peak or 0.0) * self.accelerator.num_processes

    # ------------------------------------------------------------------------------------------------------ other parts

    def score(self, wrapped: nn.Module, key: str | None, label: str, stage: Stage) -> Score:
        """Bits per byte of the validation rows. With a key it is part of the results."""
        value = score_validation(self.run, wrapped, self.accelerator, self.autocast)
        shown = f"{label}, local chunks {stage.local_chunk_sizes}" if stage.local_chunk_sizes else label
        score = Score(key or f"{stage.name}_step_{self.state.step}", shown, *value)
        if key is not None:
            self.state.scores.append(score)
        measured = {"bits_per_byte": score.bits_per_byte, "standard_error": score.standard_error}
        self.record("validation", stage, {"name": score.key, **measured})
        return score

    def record(self, event: str, stage: Stage, values: dict[str, Any]) -> None:
        """To the log, and to the trackers that were asked for."""
        state = self.state
        if self.is_main:
            self.log.write(event=event, stage=stage.name, step=state.step, tokens=state.tokens, **values)
        if self.recipe.output.trackers:
            numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            self.reporting(TRACKERS, self.accelerator.log, numbers, step=state.total_steps)
