"""What a run writes and reads back: checkpoints, the models of its stages, the best model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch.optim import Optimizer
from transformers import PreTrainedModel

from .cards import write_run_card
from .checkpoint import (
    atomic_file,
    random_state,
    read_state,
    read_tensors,
    restore_random_state,
    save_folder,
    write_state,
)
from .distributed import gather_optimizer, gather_weights, load_optimizer
from .options import to_mapping
from .plan import Run
from .report import Reporting
from .stage_model import resume_model, write_checkpoint_model, write_whole_model
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
        saved = {k.removeprefix("optimizer/"): v for k, v in tensors.items() if k.startswith("optimizer/")}
        load_optimizer(model, optimizer, saved)
        restore_random_state(read_state(self.path)["random"], tensors)


class Saver:
    """Writes from the main process what all processes gather; an error there is raised in all of them."""

    def __init__(self, run: Run, accelerator: Accelerator, reporting: Reporting):
        self.run, self.accelerator, self.folder, self.reporting = run, accelerator, run.folder, reporting
        self.newest: Path | None = None

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def open_run(self) -> Checkpoint | None:
        """The checkpoint to go on from; or, when there is none, an output folder without an earlier run's results."""
        path = None
        if self.is_main:
            if self.run.recipe.output.resume and self.folder.holds_run():
                path = self._find_readable()
            if path is None:
                self.folder.root.mkdir(parents=True, exist_ok=True)
                self.folder.clear()
                with atomic_file(self.folder.recipe_file) as file:
                    file.write_text(yaml.safe_dump(to_mapping(self.run.recipe), sort_keys=False), encoding="utf-8")
        path = self._from_main(path)
        if path is None:
            return None
        self.newest = path
        saved = read_state(path)
        state = State.from_json(saved["state"])
        state.earlier_seconds += saved["seconds"]
        return Checkpoint(self.run, path, state)

    def _find_readable(self) -> Path | None:
        self.folder.recover()
        for path in self.folder.newest_first():
            try:
                for file in path.glob("*.safetensors"):
                    with safe_open(file, framework="pt"):  # a file that was cut off does not open
                        pass
            except (SafetensorError, OSError) as error:
                print(f"{path} cannot be read ({error}); going on from the one before", flush=True)
            else:
                return path
        return None

    def save_checkpoint(self, state: State, model: PreTrainedModel, optimizer: Optimizer, *, seconds: float) -> None:
        """All that is needed to go on from here, then the oldest ones are removed.

        Args:
            seconds: that this process has run for.
        """
        weights = gather_weights(model, keep=self.is_main)
        gathered = gather_optimizer(model, optimizer, keep=self.is_main)
        random, tensors = random_state()
        tensors |= {f"optimizer/{name}": tensor for name, tensor in gathered.items()}
        stage = self.run.stages[state.stage]
        path = self.folder.checkpoint(stage.name, state.step)
        write_model = write_checkpoint_model(self.run, model, weights)

        def write(folder: Path) -> None:
            write_model(folder)
            saved = {"stage_name": stage.name, "seconds": seconds, "random": random, "state": state.to_json()}
            write_state(folder, saved, tensors)

        self._write(path, write)
        self.newest = path
        if self.is_main:
            self.folder.prune(self.run.recipe.output.keep_checkpoints)

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
        weights = gather_weights(model, keep=self.is_main)
        write_model = write_whole_model(self.run, state.stage, model, weights)

        def write(folder: Path) -> None:
            write_model(folder)
            arguments = (folder, path, self.run, state, score, self.accelerator)
            self.reporting(f"the model card of {path.name}", write_run_card, *arguments)

        self._write(path, write)

    def kept(self) -> str:
        """What is left when training stops here, as words."""
        if self.newest is None:
            return "no checkpoint had been saved yet (--output.checkpoint-every)"
        return f"the last checkpoint is kept in {self.newest}"

    def _write(self, path: Path, write: Callable[[Path], None]) -> None:
        failure = None
        if self.is_main:
            try:
                save_folder(path, write)
            except OSError as error:
                failure = str(error)
        failure = self._from_main(failure)
        if failure is not None:
            raise OSError(f"{failure}; {self.kept()}")

    def _from_main(self, value: object) -> object:
        """The main process's value, in every process."""
        if self.accelerator.num_processes == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
