"""The folder of a run: which file is what, which checkpoints there are, and which of them stay."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from .checkpoint import STATE_FILE, read_state, recover


class RunFolder:
    """`output.dir`.

    recipe.yaml                    the recipe with every default filled in
    log.jsonl                      one JSON object a line
    checkpoints/<stage>-<step>/    what a run can be resumed from
    <stage>/                       the model at the end of a stage
    best/                          the model with the lowest validation loss
    metrics.json, loss.png, sample.txt    at the end
    """

    def __init__(self, root: Path):
        self.root = root
        self.recipe_file = root / "recipe.yaml"
        self.log_file = root / "log.jsonl"
        self.metrics_file = root / "metrics.json"
        self.plot_file = root / "loss.png"
        self.sample_file = root / "sample.txt"
        self.checkpoints = root / "checkpoints"
        self.best = root / "best"

    def stage(self, name: str) -> Path:
        return self.root / name

    def checkpoint(self, stage: str, step: int) -> Path:
        return self.checkpoints / f"{stage}-{step:08d}"

    def holds_run(self) -> bool:
        return any(path.exists() for path in (self.recipe_file, self.metrics_file, self.log_file, self.checkpoints))

    def clear(self) -> None:
        """Remove the results of an earlier run, and nothing else."""
        for folder in (self.checkpoints, self.best, *map(self.stage, self._stage_names())):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.recipe_file, self.log_file, self.metrics_file, self.plot_file, self.sample_file):
            file.unlink(missing_ok=True)

    def _stage_names(self) -> list[str]:
        if not self.recipe_file.exists():
            return []
        saved = yaml.safe_load(self.recipe_file.read_text(encoding="utf-8"))
        return [stage["name"] for stage in saved["stages"]]

    def recover(self) -> None:
        """Undo what a killed process left behind in the middle of a save."""
        for folder in (self.best, *map(self.stage, self._stage_names())):
            recover(folder)
        for hidden in list(self.checkpoints.glob(".*.previous")) + list(self.checkpoints.glob(".*.saving")):
            recover(hidden.with_name(hidden.name.rpartition(".")[0].removeprefix(".")))

    def newest_first(self) -> Iterator[Path]:
        """Complete checkpoints, the furthest in training first."""
        found = [path for path in self.checkpoints.glob("*") if (path / STATE_FILE).is_file()]

        def progress(path: Path) -> tuple[int, int]:
            state = read_state(path)["state"]
            return state["stage"], state["step"]

        yield from sorted(found, key=progress, reverse=True)

    def prune(self, keep: int) -> None:
        """Remove all but the `keep` newest checkpoints."""
        for path in list(self.newest_first())[keep:]:
            shutil.rmtree(path, ignore_errors=True)
