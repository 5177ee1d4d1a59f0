"""Two-stage training (TNT, arXiv 2511.07343, section 4), from a checked plan to a folder of results.

Stage 1 trains with large chunks, which is fast; stage 2 loads its checkpoint with smaller local chunks, which are
accurate, and goes on for a few steps. Read `train`, then `train_stage`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from modeling_tnt import TNTForCausalLM
from modeling_tnt.health import memory_health

from .checkpoint import save_checkpoint
from .data import RowDataset, ShuffledRows
from .evaluate import bigram_bits_per_byte, bits_per_byte, generate_sample
from .plan import RESULT_FILES, STAGE_FOLDERS, Run, Stage
from .report import Log, Score, print_start, progress_bar, save_results


class NonFiniteError(FloatingPointError):
    """A loss or gradient norm is infinite or not a number."""


class TrainingInterrupted(KeyboardInterrupt):
    """The keyboard interrupted training; the message says where, and what is left."""


@dataclass
class State:
    """Where a run stands; saved with each checkpoint. `rows` is the position in the data."""

    stage: str = ""
    step: int = 0
    rows: int = 0
    tokens: int = 0
    checkpoint: str | None = None
    checkpoint_step: int = 0

    def kept(self) -> str:
        """What is left when training stops here, as words."""
        if self.checkpoint is None:
            return "no checkpoint had been saved yet (--checkpoint-every)"
        return f"the last good checkpoint, of step {self.checkpoint_step}, is kept in {self.checkpoint}"


def train(run: Run) -> dict[str, Any]:
    """Train all stages, evaluate, and save everything under `output_dir`. Returns what `metrics.json` holds.

    Raises:
        NonFiniteError: names the step and the last checkpoint, which is kept.
        TrainingInterrupted: on Ctrl-C, with the same.
        OSError: when something cannot be saved; the last checkpoint is kept.
    """
    began, arguments, state = time.perf_counter(), run.arguments, State()
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    set_seed(arguments.seed)
    _clear(arguments.output_dir)
    scores, stage_results = [_score_bigrams(run)], []
    with Log(arguments.output_dir / "log.jsonl") as log:
        try:
            for stage in run.stages:
                model = _start_model(run, stage, state).to(accelerator.device)
                if state.checkpoint is None:
                    print_start(run, model)
                else:
                    key = f"after_{state.stage}_at_{stage.name}_chunks"
                    scores.append(_score(run, model, key, f"after {state.stage}", log))
                stage_results.append(train_stage(run, stage, model, state, accelerator, log))
                scores.append(_score(run, model, f"after_{stage.name}", f"after {stage.name}", log))
            # From the middle: the first held-out file of the default data is a list of constants.
            prompt = run.validation.tokens[len(run.validation.tokens) // 2, : arguments.prompt_tokens]
            sample = generate_sample(
                model, run.tokenizer, prompt, new_tokens=arguments.sample_tokens, seed=arguments.seed
            )
        except KeyboardInterrupt:
            raise TrainingInterrupted(f"interrupted in {state.stage} at step {state.step}; {state.kept()}") from None
    return save_results(run, model, scores, stage_results, sample, seconds=time.perf_counter() - began)


def train_stage(
    run: Run, stage: Stage, model: PreTrainedModel, state: State, accelerator: Accelerator, log: Log
) -> dict[str, Any]:
    """Train `model` in place for one stage, with checkpoints; returns the stage's figures for `metrics.json`."""
    arguments, folder = run.arguments, run.arguments.output_dir / stage.name
    state.stage, state.step = stage.name, 0
    batch_size, seq_len = arguments.batch_size, arguments.seq_len
    order = ShuffledRows(len(run.train.tokens), seed=arguments.seed, start=state.rows, count=stage.steps * batch_size)
    loader = DataLoader(RowDataset(run.train.tokens), batch_size=batch_size, sampler=order)
    optimizer = AdamW(parameter_groups(model, arguments.weight_decay), lr=stage.learning_rate, betas=(0.9, 0.95))
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, stage.steps, arguments.warmup_share))
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    wrapped.train()
    tokens_per_byte = run.train.token_bytes.numel() / run.train.token_bytes.double().sum().item()
    began, losses = time.perf_counter(), deque(maxlen=20)
    with progress_bar(stage.steps, stage.name, "step") as bar:
        for step, batch in enumerate(loader, start=1):
            state.step = step
            loss = wrapped(**batch, use_cache=False).loss
            nats = _finite(loss, "loss", state)
            accelerator.backward(loss)
            gradient_norm = _finite(
                accelerator.clip_grad_norm_(wrapped.parameters(), arguments.max_grad_norm), "gradient norm", state
            )
            optimizer.step()
            learning_rate = schedule.get_last_lr()[0]
            schedule.step()
            optimizer.zero_grad()

            state.rows += batch_size
            state.tokens += batch_size * seq_len
            losses.append(nats / math.log(2) * tokens_per_byte)
            seconds = time.perf_counter() - began
            speed = step * batch_size * seq_len / seconds
            bar.set_postfix_str(
                f"{sum(losses) / len(losses):.3f} bits/byte, {speed:,.0f} tokens/s, gradient {gradient_norm:.2f}",
                refresh=False,
            )
            bar.update()
            log.write(
                event="step", stage=stage.name, step=step, tokens=state.tokens, loss_nats_per_token=nats,
                bits_per_byte=losses[-1], gradient_norm=gradient_norm, learning_rate=learning_rate,
                tokens_per_second=speed, seconds=seconds,
            )  # fmt: skip
            if step % arguments.health_every == 0 or step == stage.steps:
                health = memory_health(model, batch["input_ids"][:1])
                log.write(event="memory_health", stage=stage.name, step=step, tokens=state.tokens, **health)
            if step % arguments.checkpoint_every == 0 or step == stage.steps:
                _save(run, accelerator.unwrap_model(wrapped), folder, state)
    return {
        "name": stage.name, "local_chunk_sizes": stage.local_chunk_sizes, "steps": stage.steps,
        "tokens": stage.steps * batch_size * seq_len, "train_seconds": seconds, "tokens_per_second": speed,
        "train_bits_per_byte_of_last_20_steps": sum(losses) / len(losses),
    }  # fmt: skip


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: the matrices of linear layers decay; everything else does not.

    What does not decay: embeddings (and an output head tied to them), norms, biases, convolutions, the linear maps of
    the step size, momentum and forget gates, and the memories' learned initial states: those are where the inner
    optimisation starts, and their scale sets the size of its first gradients.
    """
    decayed = {}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in embeddings and not name.endswith("_gate"):
            decayed[id(module.weight)] = module.weight
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in decayed]
    return [
        {"params": [p for p in decayed.values() if p.requires_grad], "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def learning_rate_factor(step: int, steps: int, warmup_share: float) -> float:
    """Share of the peak learning rate at `step`, counted from 0: a linear rise that ends at 1, then a cosine to 0.1."""
    warmup = math.ceil(warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# ------------------------------------------------------------------------------------------------------------- steps


def _start_model(run: Run, stage: Stage, state: State) -> PreTrainedModel:
    """A new model, or the checkpoint of the stage before with this stage's chunk sizes."""
    if state.checkpoint is None:
        return TNTForCausalLM(run.config)
    return TNTForCausalLM.from_pretrained(state.checkpoint, local_chunk_sizes=stage.local_chunk_sizes)


def _score_bigrams(run: Run) -> Score:
    """The baseline, on the text that the model is scored on."""
    scored = int(run.validation.token_bytes.sum().item())
    value = bigram_bits_per_byte(run.documents.train, run.documents.validation, limit_bytes=scored)
    return Score("byte_bigram", "byte bigram model", value)


def _score(run: Run, model: PreTrainedModel, key: str, label: str, log: Log) -> Score:
    rows = run.validation
    with progress_bar(len(rows.tokens), "validation", "row", leave=False) as bar:
        value = bits_per_byte(model, rows, batch_size=run.arguments.batch_size, on_batch=bar.update)
    log.write(event="validation", name=key, bits_per_byte=value, tokens=rows.tokens.numel())
    return Score(key, f"{label}, local chunks {model.config.local_chunk_sizes}", value)


def _finite(value: torch.Tensor, name: str, state: State) -> float:
    number = float(value.detach())
    if not math.isfinite(number):
        raise NonFiniteError(
            f"the {name} is {number} at step {state.step} of {state.stage}, before the weights were changed; "
            f"{state.kept()}. Try a smaller --learning-rate"
        )
    return number


def _save(run: Run, model: PreTrainedModel, folder: Path, state: State) -> None:
    saved = State(**{**asdict(state), "checkpoint": str(folder), "checkpoint_step": state.step})
    save_checkpoint(folder, model, run.tokenizer, asdict(saved))
    state.checkpoint, state.checkpoint_step = saved.checkpoint, saved.checkpoint_step


def _clear(output_dir: Path) -> None:
    """Remove an earlier run's results, which `prepare` has made sure that the user wants, and nothing else."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in STAGE_FOLDERS:
        shutil.rmtree(output_dir / name, ignore_errors=True)
    for name in RESULT_FILES:
        (output_dir / name).unlink(missing_ok=True)
