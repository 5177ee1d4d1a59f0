"""Tokens per second of a training step of each row, measured apart from training: one process, models alternating."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import AdamW
from transformers import LlamaForCausalLM, PreTrainedModel

from modeling_tnt import TNTForCausalLM
from modeling_tnt.compat import enable_checkpointing

from ..bench.attempt import OK, attempt
from ..bench.timing import Deadline, synchronize
from ..common.files import atomic_file
from ..common.machine import describe_machine
from ..common.models import make_llama_config
from ..common.progress import progress_bar
from ..loop.optim import parameter_groups
from .jobs import Job

WARM_UP_STEPS = 1
TIMED_STEPS = 2


class Speed(NamedTuple):
    """Tokens per second: of the median step, of the slowest and of the fastest; of `steps` steps."""

    median: float
    lowest: float
    highest: float
    steps: int


def measure_speeds(jobs: Sequence[Job], *, rounds: int, device: str, path: Path, deadline: Deadline) -> None:
    """Time the last stage's training steps of every job and write them to `path`.

    In each round every model is built, takes a step that warms up and `TIMED_STEPS` that count: forward, backward and
    AdamW on one micro-batch of random tokens, in the recipe's precision. What the machine does besides then falls on
    all models alike. Of several jobs with the same steps one is measured.
    """
    place = torch.device(device)
    seconds: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    contenders = {_identity(job): job for job in reversed(jobs)}
    with progress_bar(rounds * len(contenders), "speed", "model") as bar:
        for _ in range(rounds):
            for identity, job in contenders.items():
                if identity in reasons:
                    continue
                refusal = deadline.refuse()
                if refusal is not None:
                    print(f"speed is not measured: {refusal}", flush=True)
                    return
                outcome = attempt(lambda job=job: _time_steps(job, place), place)
                if outcome.status == OK:
                    seconds.setdefault(identity, []).extend(outcome.value)
                else:
                    reasons[identity] = outcome.reason
                    print(f"speed of {job.row} is not measured: {outcome.reason}", flush=True)
                bar.update()
    rows = {}
    for job in jobs:
        identity = _identity(job)
        rows[job.row] = {"tokens": _tokens(job), "seconds": seconds.get(identity, [])}
        if identity in reasons:
            rows[job.row]["reason"] = reasons[identity]
    with atomic_file(path) as file:
        record = {"machine": describe_machine(place), "rows": rows}
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_speeds(path: Path) -> tuple[str, dict[str, Speed]]:
    """The machine and the speed of each row that was measured; nothing without the file."""
    if not path.is_file():
        return "", {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    return saved["machine"], {
        row: Speed(
            item["tokens"] / statistics.median(item["seconds"]), item["tokens"] / max(item["seconds"]),
            item["tokens"] / min(item["seconds"]), len(item["seconds"]),
        )
        for row, item in saved["rows"].items() if item["seconds"]
    }  # fmt: skip


def has_speeds(path: Path, rows: Iterable[str]) -> bool:
    """Whether all these rows were measured, or could not be."""
    return path.is_file() and set(rows) <= json.loads(path.read_text(encoding="utf-8"))["rows"].keys()


def _identity(job: Job) -> str:
    """The same for jobs whose last stage takes the same steps."""
    stage, model = job.stages[-1], job.recipe.model
    return json.dumps([model.architecture, job.config.to_diff_dict(), stage.local_chunk_sizes, stage.seq_len])


def _micro_batch(job: Job) -> int:
    return job.recipe.training.micro_batch_size or job.recipe.training.batch_size


def _tokens(job: Job) -> int:
    return _micro_batch(job) * job.stages[-1].seq_len


def _time_steps(job: Job, device: torch.device) -> list[float]:
    """Seconds of each timed step."""
    torch.manual_seed(0)
    model = _build(job).to(device)
    model.train()
    step = _make_step(job, model, device)
    times = []
    for i in range(WARM_UP_STEPS + TIMED_STEPS):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        if i >= WARM_UP_STEPS:
            times.append(time.perf_counter() - began)
    return times


def _build(job: Job) -> PreTrainedModel:
    stage, training = job.stages[-1], job.recipe.training
    if job.recipe.model.architecture == "llama":
        model: PreTrainedModel = LlamaForCausalLM(make_llama_config(job.config, stage.seq_len))
    else:
        model = TNTForCausalLM(copy.deepcopy(job.config))
        if stage.local_chunk_sizes:
            model.set_local_chunks(stage.local_chunk_sizes, stage.local_shard_lengths)
    if training.gradient_checkpointing:
        enable_checkpointing(model)
    if training.compile:
        model.compile()
    return model


def _make_step(job: Job, model: PreTrainedModel, device: torch.device) -> Callable[[], Any]:
    optimizer = AdamW(parameter_groups(model, job.recipe.optimizer.weight_decay), lr=1e-4)
    shape = (_micro_batch(job), job.stages[-1].seq_len)
    tokens = torch.randint(job.config.vocab_size, shape, device=device)
    autocast = job.recipe.training.mixed_precision == "bf16"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
