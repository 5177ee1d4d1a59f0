"""What a run shows and leaves: progress bar, log, figures, plot, sample, and the summary at the end."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import accelerate
import torch
import transformers
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..common.files import atomic_file
from ..common.machine import OtherProcesses, advise_threads
from ..common.model_facts import count_parameters
from ..common.progress import progress_bar
from ..options import to_mapping
from ..plan import Run, Stage
from .health import find_idle_memories
from .picture import save_plot
from .state import Score, State, score_key

T = TypeVar("T")


class Log:
    """One JSON object a line, written as it happens. NaN and infinities, which JSON lacks, are written as null.

    Args:
        keep_bytes: how much of a log that is there is kept: what a run had written when it saved the checkpoint that it
            now goes on from.
        active: False in processes other than the main one, which write nothing.
    """

    def __init__(self, path: Path, *, keep_bytes: int = 0, active: bool = True):
        self.path, self.keep_bytes, self.active = path, keep_bytes, active

    def __enter__(self) -> Log:
        if self.active:
            self.file = self.path.open("ab")
            # What a crash of the machine took from the end cannot be kept, and must not become zeros.
            written = self.path.read_bytes()
            kept = self.keep_bytes
            if len(written) < kept:
                kept = written.rfind(b"\n") + 1
                print(f"{self.path} was cut off or removed: the run goes on without the records lost there", flush=True)
            self.file.truncate(kept)
            self.file.seek(0, os.SEEK_END)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.active:
            self.file.close()

    def write(self, **record: Any) -> None:
        finite = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in record.items()}
        self.file.write((json.dumps(finite) + "\n").encode())
        self.file.flush()

    def size(self) -> int:
        """Bytes written so far, on the disk."""
        if not self.active:
            return 0
        os.fsync(self.file.fileno())
        return self.file.tell()


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


LOOK_STEPS = 20  # after which it is known what else the CPUs do


class Progress:
    """The bar of a stage: loss, tokens/s, and on a known GPU the model FLOPs utilisation; tqdm adds the time left."""

    def __init__(self, stage: Stage, state: State, *, active: bool, device: torch.device):
        self.bar = progress_bar(stage.steps, stage.name, "step", initial=state.step, active=active)
        self.others = OtherProcesses() if active and device.type == "cpu" else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def show(self, state: State, gradient_norm: float, utilisation: float | None) -> None:
        used = "" if utilisation is None else f", MFU {utilisation:.1%}"
        self.bar.set_postfix_str(
            f"{state.recent_loss:.3f} bits/byte, {state.tokens_per_second:,.0f} tokens/s{used}, "
            f"gradient {gradient_norm:.2f}",
            refresh=False,
        )
        self.bar.update()
        if self.others is not None and self.bar.n - self.bar.initial == LOOK_STEPS:
            advice = advise_threads(self.others.cpus(), torch.get_num_threads())
            if advice:
                self.bar.write(f"warning  {advice}", file=sys.stderr)


def print_start(run: Run, model: PreTrainedModel, accelerator: Accelerator, resumed_from: Path | None) -> None:
    """Say what is trained on what, before the first step."""
    train, held_out = run.data.train, run.data.validation
    stages = ", then ".join(f"{s.steps} steps{_describe(s)}" for s in run.stages)
    training, model_options = run.recipe.training, run.recipe.model
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    if run.layout.context_size > 1:
        processes += f", {run.layout.context_size} to a row"
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = model_options.start_from or model_options.preset
    name = name if model_options.architecture == "tnt" else f"{model_options.architecture} of the size of {name}"
    some = "" if trained == total else f", {trained / 1e6:.2f} M trained"
    lines = [
        f"data     {run.data.description}",
        f"         {_size(train)} to train on, {_size(held_out)} held out",
        f"model    {name}, {total / 1e6:.2f} M parameters{some}, on {accelerator.device}{processes}",
        f"plan     {stages}; {training.batch_size} x {run.stages[0].seq_len} tokens a step",
        f"results  {run.folder.root}",
    ]
    if resumed_from is not None:
        lines.append(f"resumed  from {resumed_from}")
    print("\n".join(lines) + "\n", flush=True)


def _describe(stage: Stage) -> str:
    chunks = f" with local chunks {stage.local_chunk_sizes}" if stage.local_chunk_sizes else ""
    return chunks + ("" if stage.trainable == "all" else f" ({stage.trainable})")


class Reporting:
    """Calls what only reports: where that fails, a warning says so once, and the run goes on."""

    def __init__(self) -> None:
        self.failed: set[str] = set()

    def __call__(self, what: str, report: Callable[..., T], *args: Any, otherwise: T | None = None, **kwargs: Any) -> T:
        """What `report` returns, or `otherwise` when it fails. What has failed is not tried again."""
        if what not in self.failed:
            try:
                return report(*args, **kwargs)
            except Exception as error:  # of any library that draws, writes or sends
                self.failed.add(what)
                print(f"warning  {what} failed ({type(error).__name__}: {error}); the run goes on without", flush=True)
        return otherwise


def save_results(
    run: Run, state: State, sample: tuple[str, str], reporting: Reporting, *, seconds: float
) -> dict[str, Any]:
    """Write metrics.json, loss.png and sample.txt, print the summary, and return what metrics.json holds."""
    folder = run.folder
    prompt, continuation = sample
    train, held_out = run.data.train, run.data.validation
    metrics = {
        "validation_bits_per_byte": {score.key: score.bits_per_byte for score in state.scores},
        "best_validation_bits_per_byte": state.best,
        "validation_tokens": len(run.validation) * run.validation.seq_len,
        "stages": state.stages,
        "seconds": seconds,
        "parameters": count_parameters(run.config),
        "data": run.data.description,
        "train_bytes": train.num_bytes,
        "documents": {"train": train.num_documents, "validation": held_out.num_documents},
        "model": str(folder.stage(run.stages[-1].name)),
        "sample": {"prompt": prompt, "continuation": continuation},
        "recipe": to_mapping(run.recipe),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "accelerate": accelerate.__version__,
        },
    }  # fmt: skip
    with atomic_file(folder.metrics_file) as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    if continuation:
        with atomic_file(folder.sample_file) as path:
            path.write_text(f"{prompt}\n\n----- continued by the model -----\n\n{continuation}\n", encoding="utf-8")
    log = reporting("reading the log", read_log, folder.log_file, otherwise=[])
    reporting("the plot", save_plot, folder.plot_file, log, state.scores)
    _print_summary(run, metrics, state.scores)
    for sentence in reporting("the memories' health", find_idle_memories, log, otherwise=[]):
        print(f"warning  {sentence}; see {folder.plot_file.name}", flush=True)
    return metrics


def _print_summary(run: Run, metrics: dict[str, Any], scores: list[Score]) -> None:
    sample = metrics["sample"]
    width = max(len(score.label) for score in scores)
    lines = [f"\nvalidation bits per byte, on {metrics['validation_tokens']:,} tokens of held-out documents"]
    mismatches = find_mismatches(run, scores)
    for score in scores:
        remark = "   the mismatch that the next stage is to cure" if score.key in mismatches else ""
        lines.append(f"  {score.label:<{width}}  {score.bits_per_byte:.3f}{remark}")
    if sample["continuation"]:
        lines += ["\nsample: a validation prompt, and after >>> the model's continuation", "-" * 60]
        lines += [_printable(f"{sample['prompt']}>>>{sample['continuation']}"), "-" * 60]
    lines += [f"model    {metrics['model']}", f"figures  {run.folder.metrics_file}, {run.folder.plot_file.name}"]
    lines += [f"took     {metrics['seconds']:.0f} seconds"]
    print("\n".join(lines), flush=True)


def _printable(text: str) -> str:
    """A text of a model for a terminal, which takes some control characters for commands: those are shown as \ufffd."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def find_mismatches(run: Run, scores: list[Score]) -> set[str]:
    """The keys of the scores that are worse than those of the same weights at the chunks that they were trained at."""
    found = {score.key: score.bits_per_byte for score in scores}
    pairs = {score_key(before.name, at=after.name): score_key(before.name) for before, after in pairwise(run.stages)}
    return {key for key, own in pairs.items() if round(found.get(key, 0.0), 3) > round(found.get(own, math.inf), 3)}


def _size(side: Any) -> str:
    documents = f"{side.num_documents:,} document{'s' if side.num_documents != 1 else ''}"
    return f"{side.num_bytes / 1e6:.2f} MB in {documents}"
