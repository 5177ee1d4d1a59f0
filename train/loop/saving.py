"""What a run writes and reads back: checkpoints, the models of its stages, the best model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from accelerate import Accelerator
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ..common.files import atomic_file, is_disk_full
from ..hub.cards import write_run_card
from ..options import to_mapping
from ..plan import Run
from .checkpoint import (
    STATE_FILE,
    find_damage,
    gather_optimizer,
    gather_weights,
    load_optimizer,
    random_state,
    read_state,
    read_tensors,
    restore_random_state,
    write_checksums,
    write_state,
)
from .distributed import from_main
from .report import Reporting
from .stage_model import resume_model, save_checkpoint_model, save_whole_model
from .state import Score, State


@dataclass
class Checkpoint:
    """A checkpoint that a run goes on from."""

    run: Run
    path: Path
    state: State

    def load_model(self) -> PreTrainedModel:
        return resume_model(self.run, self.state.stage, self.path)

    def load_training_state(self, model: PreTrainedModel, optimizer: Optimizer) -> None:
        """The optimizer's state and that of the random number generators."""
        tensors = read_tensors(self.path)
        load_optimizer(model, optimizer, tensors)
        restore_random_state(read_state(self.path)["random"], tensors)


class Saver:
    """Writes from the main process what all processes gather; an error there is raised in all of them."""

    def __init__(self, run: Run, accelerator: Accelerator, reporting: Reporting):
        self.run, self.accelerator, self.folder, self.reporting = run, accelerator, run.folder, reporting
        self.stages = [stage.name for stage in run.stages]
        self.newest: Path | None = None
        self.damaged: list[Path] = []

    @contextmanager
    def hold_folder(self) -> Iterator[None]:
        """Hold the output folder against other runs. Raises OSError in all processes when another run holds it."""
        with ExitStack() as held:
            from_main(self.accelerator, lambda: held.enter_context(self.folder.hold()))
            yield

    def open_run(self) -> Checkpoint | None:
        """The checkpoint to go on from; or, when there is none, an output folder without an earlier run's results.

        Raises ValueError for files of a user that are in the way, and when there are checkpoints and none is whole.
        """
        self.newest = from_main(self.accelerator, self._find_or_begin)
        if self.newest is None:
            return None
        saved = read_state(self.newest)
        state = State.from_json(saved["state"])
        state.earlier_seconds += saved["seconds"]
        return Checkpoint(self.run, self.newest, state)

    def _find_or_begin(self) -> Path | None:
        names = self.folder.names(self.stages)
        if self.run.recipe.output.resume and self.folder.newest_first(self.stages):
            if not self.folder.listed():
                print(f"{self.folder.root} is of an earlier version; what that wrote is never removed", flush=True)
            self.folder.claim(names)
            self.folder.recover()
            return self._find_whole()
        problems = list(self.folder.find_problems(names, flag="--output.dir", overwrite=True))
        if problems:
            raise ValueError(problems[0])
        self.folder.clear()
        self.folder.claim(names)
        with atomic_file(self.folder.recipe_file) as file:
            file.write_text(yaml.safe_dump(to_mapping(self.run.recipe), sort_keys=False), encoding="utf-8")
        return None

    def _find_whole(self) -> Path:
        for path in self.folder.newest_first(self.stages):
            damage = find_damage(path) or _find_other_state(path)
            if damage is None:
                return path
            print(f"{path} is damaged: {damage}; trying the one before", flush=True)
            self.damaged.append(path)
        raise ValueError(
            f"no checkpoint in {self.folder.checkpoints} is whole ({damage}); bring one back from a copy, or begin "
            "anew with --output.overwrite"
        )

    def save_checkpoint(self, state: State, model: PreTrainedModel, optimizer: Optimizer, *, seconds: float) -> None:
        """All that is needed to go on from here, then the oldest ones are removed.

        Args:
            seconds: that this process has run for.
        """
        weights, optimizer_state = gather_weights(model), gather_optimizer(model, optimizer)
        random, tensors = random_state()
        stage = self.run.stages[state.stage]
        path = self.folder.checkpoint(stage.name, state.step)

        def write(folder: Path) -> None:
            save_checkpoint_model(folder, self.run, model, weights)
            saved = {
                "stage_name": stage.name, "seconds": seconds, "random": random, "data": self.run.data_summary,
                "state": state.to_json(),
            }  # fmt: skip
            write_state(folder, saved, tensors | optimizer_state)
            write_checksums(folder)

        self._save(path, write)
        self.newest = path
        from_main(self.accelerator, self._prune)

    def _prune(self) -> None:
        self.damaged = [path for path in self.damaged if path != self.newest]
        self.folder.prune(self.stages, self.run.recipe.output.keep_checkpoints, self.damaged)
        self.damaged.clear()

    def save_stage(self, state: State, model: PreTrainedModel, score: Score) -> None:
        self._save_model(self.folder.stage(self.run.stages[state.stage].name), state, model, score)

    def save_best(self, state: State, model: PreTrainedModel, score: Score) -> None:
        """Keep the model if no earlier one had a lower validation loss."""
        if state.best is not None and score.bits_per_byte >= state.best:
            return
        state.best = score.bits_per_byte
        self._save_model(self.folder.best, state, model, score)

    def _save_model(self, path: Path, state: State, model: PreTrainedModel, score: Score) -> None:
        """The model with its card."""
        weights = gather_weights(model)

        def write(folder: Path) -> None:
            save_whole_model(folder, self.run, state.stage, model, weights)
            arguments = (folder, path, self.run, state, score, self.accelerator)
            self.reporting(f"the model card of {path.name}", write_run_card, *arguments)

        self._save(path, write)

    def kept(self) -> str:
        """What is left when training stops here, as words."""
        if self.newest is None:
            return "no checkpoint had been saved yet (--output.checkpoint-every)"
        return f"the last checkpoint is kept in {self.newest}"

    def _save(self, path: Path, write: Callable[[Path], None]) -> None:
        try:
            from_main(self.accelerator, lambda: self._save_folder(path, write))
        except OSError as error:
            raise OSError(f"{error}; {self.kept()}") from error

    def _save_folder(self, path: Path, write: Callable[[Path], None]) -> None:
        """Where the disk is full, the checkpoints before the newest make room. A whole one is there at every moment."""
        try:
            self.folder.save_folder(path, write)
        except OSError as error:
            if not is_disk_full(error):
                raise
            if not self.folder.prune(self.stages, 1, self.damaged):
                raise OSError(f"{error}; make room: the newest checkpoint stays until the next one is whole") from error
            self.folder.save_folder(path, write)


def _find_other_state(path: Path) -> str | None:
    try:
        State.from_json(read_state(path)["state"])
    except (TypeError, KeyError, ValueError) as error:
        return f"{STATE_FILE} holds no state that this version knows ({error})"
    return None
