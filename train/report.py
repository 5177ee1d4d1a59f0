"""What a run shows and leaves: progress bar, log, figures, plot, sample, and the summary at the end."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

from .checkpoint import atomic_file
from .plan import Run
from .plot import save_plot


class Score(NamedTuple):
    """Validation bits per byte: the key in metrics.json, the words in the summary, the value."""

    key: str
    label: str
    bits_per_byte: float


class Log:
    """One JSON object a line, written as it happens. NaN and infinities, which JSON lacks, are written as null."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Log:
        self.file = self.path.open("w", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def write(self, **record: Any) -> None:
        finite = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def progress_bar(total: int, name: str, unit: str, leave: bool = True) -> tqdm:
    """A bar on a terminal; in a log file a line every 20 seconds."""
    interval = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(total=total, desc=name, unit=unit, leave=leave, mininterval=interval, dynamic_ncols=True)


def print_start(run: Run, model: PreTrainedModel) -> None:
    """Say what is trained on what, before the first step."""
    train, held_out = run.documents
    stages = ", then ".join(f"{s.steps} steps with local chunks {s.local_chunk_sizes}" for s in run.stages)
    print(
        f"data     {run.description}\n"
        f"         {_megabytes(train)} to train on, {_megabytes(held_out)} held out\n"
        f"model    {run.arguments.preset}, {model.num_parameters() / 1e6:.2f} M parameters, on {model.device}\n"
        f"plan     {stages}; {run.arguments.batch_size} x {run.arguments.seq_len} tokens a step\n"
        f"results  {run.arguments.output_dir}\n",
        flush=True,
    )


def save_results(
    run: Run,
    model: PreTrainedModel,
    scores: list[Score],
    stages: list[dict[str, Any]],
    sample: tuple[str, str],
    *,
    seconds: float,
) -> dict[str, Any]:
    """Write metrics.json, loss.png and sample.txt, print the summary, and return what metrics.json holds."""
    output_dir = run.arguments.output_dir
    prompt, continuation = sample
    metrics = {
        "validation_bits_per_byte": {score.key: score.bits_per_byte for score in scores},
        "validation_tokens": run.validation.tokens.numel(),
        "stages": stages,
        "seconds": seconds,
        "parameters": model.num_parameters(),
        "data": run.description,
        "train_bytes": sum(len(d.text.encode()) for d in run.documents.train),
        "documents": {"train": len(run.documents.train), "validation": len(run.documents.validation)},
        "model": str(output_dir / run.stages[-1].name),
        "sample": {"prompt": prompt, "continuation": continuation},
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(run.arguments).items()},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "accelerate": accelerate.__version__,
        },
    }  # fmt: skip
    with atomic_file(output_dir / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    with atomic_file(output_dir / "sample.txt") as path:
        path.write_text(f"{prompt}\n\n----- continued by the model -----\n\n{continuation}\n", encoding="utf-8")
    with atomic_file(output_dir / "loss.png") as path:
        save_plot(path, read_log(output_dir / "log.jsonl"), [(s.key, s.label, s.bits_per_byte) for s in scores])
    _print_summary(metrics, scores)
    return metrics


def _print_summary(metrics: dict[str, Any], scores: list[Score]) -> None:
    sample = metrics["sample"]
    width = max(len(score.label) for score in scores)
    lines = [f"\nvalidation bits per byte, on {metrics['validation_tokens']:,} tokens of held-out documents"]
    for score in scores:
        remark = "   the mismatch that stage 2 is to cure" if "_at_" in score.key else ""
        lines.append(f"  {score.label:<{width}}  {score.bits_per_byte:.3f}{remark}")
    lines += ["\nsample: a validation prompt, and after >>> the model's continuation", "-" * 60]
    lines += [f"{sample['prompt']}>>>{sample['continuation']}", "-" * 60]
    lines += [f"model    {metrics['model']}", f"figures  {Path(metrics['model']).parent / 'metrics.json'}, loss.png"]
    lines += [f"took     {metrics['seconds']:.0f} seconds"]
    print("\n".join(lines), flush=True)


def _megabytes(documents: list) -> str:
    size = sum(len(d.text.encode()) for d in documents)
    return f"{size / 1e6:.2f} MB in {len(documents)} document{'s' if len(documents) != 1 else ''}"
