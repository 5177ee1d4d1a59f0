"""`tnt push`: send a saved model to the Hub."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import enable_progress_bars

from ..options import option
from .push import PushError, Target, push_model


@dataclass
class PushArguments:
    """What `tnt push` needs to know; every field but the first two is a flag."""

    model: Path = option(Path(), "push", "folder of a saved model", positional=True)
    repo: str = option("", "push", "repository on the Hub: user/name, or name for one of your own", positional=True)
    private: bool = option(False, "push", "make a new repository private; an existing one must be")
    revision: str | None = option(None, "push", "branch to push to, made from main if it is new; none: main")
    message: str | None = option(None, "push", "title of the commit")
    include: list[str] = option([], "push", "patterns of further files in the folder to send, e.g. results/*.json")
    overwrite: bool = option(False, "push", "also push to a repository that holds another type of model")
    dry_run: bool = option(False, "push", "list what would be sent, and send nothing; needs no network and no token")


def run_push(arguments: PushArguments) -> int:
    """The command `tnt push`: returns its exit status, and prints errors to stderr.

    0: done; 1: the Hub could not be reached, or the connection broke; 2: a folder, a name, a token or a repository that
    cannot be used; 130: interrupted.
    """
    try:
        target = Target(arguments.repo, arguments.private, arguments.revision, arguments.overwrite)
        if sys.stderr.isatty():
            enable_progress_bars()  # which the command turns off for the reading of models
        push_model(
            HfApi(), arguments.model, target, include=arguments.include, message=arguments.message,
            dry_run=arguments.dry_run,
        )  # fmt: skip
    except PushError as error:
        kept = f"{arguments.model} is kept; the same command goes on, without what has arrived"
        print(f"\ntnt push: error: {error}; {kept}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"\ntnt push: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntnt push: interrupted; the same command goes on, without what has arrived", file=sys.stderr)
        return 130
    return 0
