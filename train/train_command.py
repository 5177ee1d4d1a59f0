"""`tnt train`: from a recipe to an exit status."""

from __future__ import annotations

import signal

from accelerate import Accelerator

from .common.errors import NonFiniteError, OutOfMemory, ProcessLost, TrainingStopped
from .loop.trainer import train
from .options import fail
from .plan import find_missing_trackers, prepare
from .recipe import Recipe


def run_train(recipe: Recipe) -> int:
    """The command `tnt train`: returns its exit status, and prints errors to stderr."""
    try:
        accelerator = start_accelerator(recipe)
        run = prepare(recipe, accelerator)
    except (ValueError, TypeError, OSError) as error:
        return fail("train", error, status=2)
    except KeyboardInterrupt:
        return fail("train", "interrupted before training began", status=130)
    try:
        train(run, accelerator)
    except (NonFiniteError, OutOfMemory, ProcessLost, OSError, ValueError) as error:
        return fail("train", error, status=1)
    except TrainingStopped as stopped:
        return fail("train", stopped, status=143 if stopped.signal == signal.SIGTERM else 130)
    except KeyboardInterrupt:
        return fail("train", f"interrupted; what was saved is kept in {run.folder.root}", status=130)
    return 0


def start_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate as the launcher configured it, with the recipe's precision and trackers.

    A recipe that breaks a rule gets neither: `prepare` reports that rule, together with everything else.
    """
    if recipe.problems() or find_missing_trackers(recipe):
        return Accelerator(mixed_precision="no")
    output = recipe.output
    return Accelerator(
        mixed_precision=recipe.training.mixed_precision, log_with=output.trackers or None, project_dir=output.dir
    )
