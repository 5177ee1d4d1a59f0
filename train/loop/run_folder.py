"""The folder of a run: which file is what, which checkpoints there are, and which of them stay."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from ..common.output_folder import OutputFolder
from .checkpoint import CHECKSUMS_FILE, STATE_FILE, TENSORS_FILE


class RunFolder(OutputFolder):
    """`output.dir`.

    recipe.yaml                    the recipe with every default filled in
    log.jsonl                      one JSON object a line
    checkpoints/<stage>-<step>/    what a run can be resumed from
    <stage>/                       the model at the end of a stage
    best/                          the model with the lowest validation loss
    metrics.json, loss.png, sample.txt    at the end
    tnt-manifest.json, .tnt.lock   see `OutputFolder`
    """

    def __init__(self, root: Path):
        super().__init__(root, "train")
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

    def names(self, stages: Iterable[str]) -> list[str]:
        """Everything that a run with these stages writes."""
        files = (self.recipe_file, self.log_file, self.metrics_file, self.plot_file, self.sample_file)
        models = [self.best, *map(self.stage, stages)]
        pictures = [model / self.plot_file.name for model in models]  # put there at the end
        return [
            *map(self._name, (*files, *pictures)), *(f"{self._name(f)}/" for f in (self.checkpoints, *models))
        ]  # fmt: skip

    def holds_run(self) -> bool:
        """Whether a run has written here; one of an earlier version, which kept no list, has a recipe.

        Raises ValueError for a manifest that is damaged.
        """
        return self.recipe_file.exists() or any((self.root / name).is_file() for name in self.listed())

    def newest_first(self, stages: list[str]) -> list[Path]:
        """Checkpoints of these stages, whole or not, the furthest in training first."""
        found = []
        for path in self.checkpoints.glob("*"):
            stage, _, step = path.name.rpartition("-")
            parts = (STATE_FILE, TENSORS_FILE, CHECKSUMS_FILE)
            if stage in stages and step.isdecimal() and any((path / name).exists() for name in parts):
                found.append((stages.index(stage), int(step), path))
        return [path for *_, path in sorted(found, reverse=True)]

    def prune(self, stages: list[str], keep: int, damaged: Collection[Path] = ()) -> bool:
        """Remove all but the `keep` newest checkpoints, and those that are damaged. Returns whether any was removed."""
        paths = self.newest_first(stages)
        whole = [path for path in paths if path not in damaged]
        old = [path for path in paths if path not in whole[:keep]]
        return any([self.remove_folder(path) for path in old])
