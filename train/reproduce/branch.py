"""Two runs that share their first stage: the second one is begun from the end of the other's."""

from __future__ import annotations

import shutil

import yaml

from ..common.files import atomic_folder, files_below
from ..loop.checkpoint import read_state
from ..loop.run_folder import RunFolder
from ..options import to_mapping
from .jobs import Job


def begin_from_first_stage(job: Job, parent: Job) -> None:
    """Give `job` the last checkpoint of `parent`'s first stage, as if it had trained that stage itself and been stopped
    there; `--resume` then goes on with the second stage, on the same data in the same order.

    Does nothing when the run has begun already. Raises OSError without such a checkpoint, or when it cannot be written,
    ValueError for a damaged manifest of the run.
    """
    if job.folder.holds_run():
        return
    stage = parent.stages[0]
    checkpoint = parent.folder.checkpoint(stage.name, stage.steps)
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is missing, from which this run begins; --overwrite trains it again")
    with atomic_folder(job.folder.root) as path:
        fresh = RunFolder(path)
        shutil.copytree(checkpoint, fresh.checkpoint(stage.name, stage.steps))
        # The log up to the checkpoint; the trainer cuts off what the parent wrote after it.
        log = parent.folder.log_file.read_bytes()
        fresh.log_file.write_bytes(log[: read_state(checkpoint)["state"]["log_bytes"]])
        fresh.recipe_file.write_text(yaml.safe_dump(to_mapping(job.recipe), sort_keys=False), encoding="utf-8")
        fresh.claim(file.relative_to(path).as_posix() for file in files_below(path))
