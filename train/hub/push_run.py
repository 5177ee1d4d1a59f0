"""What `tnt train --push-to-hub` adds to a run: checks before it begins, and pushes on its way and at its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import CONFIG_NAME

from ..options import flag_of
from ..recipe import OutputOptions
from .push import PushError, Target, check_target, push_model


def find_wrong_push(output: OutputOptions, model_type: str, accelerator: Accelerator) -> Iterator[str]:
    """What would keep the model from being pushed when the run is done, asked for by the main process."""
    if output.push_to_hub is None:
        given = [name for name in ("push_private", "push_revision", "push_dry_run") if getattr(output, name)]
        if output.push_every != "end":
            given.append("push_every")
        for name in given:
            yield f"{flag_of(f'output.{name}')} needs a repository; give --push-to-hub user/name"
        return
    problem = [None]
    if accelerator.is_main_process:
        try:
            target = _target(output)
            if not output.push_dry_run:
                check_target(HfApi(), target, model_type)
        except (ValueError, OSError) as error:
            problem = [f"--push-to-hub {output.push_to_hub}: {error}"]
    (problem,) = broadcast_object_list(problem)
    if problem is not None:
        yield problem


def _target(output: OutputOptions) -> Target:
    return Target(output.push_to_hub, output.push_private, output.push_revision)


class RunPusher:
    """Pushes models of a run, from the main process."""

    def __init__(self, output: OutputOptions):
        self.output, self.api = output, HfApi()

    def push_checkpoint(self, folder: Path, message: str) -> None:
        """The model of a checkpoint, if they are pushed. Where that fails it is said, and training goes on."""
        if self.output.push_to_hub is None or self.output.push_every != "save":
            return
        if not (folder / CONFIG_NAME).is_file():
            print(
                f"{folder} holds an adapter without its model, and is not pushed; the merged model will be", flush=True
            )
            return
        try:
            self._push(folder, message)
        except (ValueError, OSError) as error:
            print(f"{folder} was not pushed: {error}; training goes on, and pushes again later", flush=True)

    def push_end(self, folder: Path, message: str) -> None:
        """The model of the last stage, if one is pushed. Raises PushError, which names the command that finishes it."""
        if self.output.push_to_hub is None:
            return
        try:
            self._push(folder, message)
        except (ValueError, OSError) as error:
            raise PushError(
                f"the model was trained, and is kept in {folder}, but was not pushed: {error}. When that is mended, "
                f"this finishes it: {self._command(folder)}"
            ) from error

    def _push(self, folder: Path, message: str) -> None:
        push_model(self.api, folder, _target(self.output), message=message, dry_run=self.output.push_dry_run)

    def _command(self, folder: Path) -> str:
        flags = ["--private"] if self.output.push_private else []
        if self.output.push_revision is not None:
            flags += ["--revision", self.output.push_revision]
        return shlex.join(["tnt", "push", str(folder), self.output.push_to_hub, *flags])
