"""The `tnt` command."""

from __future__ import annotations

import sys

from transformers.utils import logging as transformers_logging

from .arguments import Parser, add_train_flags, to_train_arguments
from .plan import prepare
from .trainer import NonFiniteError, train


def main(argv: list[str] | None = None) -> int:
    """Run `tnt` with `argv` (by default the process's own) and return its exit status.

    0: done; 1: training stopped (a non-finite loss, a disk that is full); 2: arguments or data that cannot be used;
    130: interrupted from the keyboard.
    """
    parser = _build_parser()
    arguments = to_train_arguments(parser.parse_args(argv))
    transformers_logging.disable_progress_bar()  # saving and loading a model of this size needs none of its own
    try:
        run = prepare(arguments)
    except (ValueError, TypeError, OSError) as error:
        return _fail(error, status=2)
    except KeyboardInterrupt:
        return _fail("interrupted before training began", status=130)
    try:
        train(run)
    except (NonFiniteError, OSError) as error:
        return _fail(error, status=1)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted after training, while the results were written", status=130)
    return 0


def _build_parser() -> Parser:
    parser = Parser(prog="tnt", description="TNT, Titans and TTT memories for transformers.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    train_parser = commands.add_parser(
        "train",
        help="train a model in two stages",
        description="Train a model in two stages: with the preset's chunk sizes, then a few steps with smaller local "
        "ones. Without arguments: the preset tiny, on the source files of Python's standard library.",
        allow_abbrev=False,
    )
    add_train_flags(train_parser)
    return parser


def _fail(error: BaseException | str, status: int) -> int:
    print(f"\ntnt train: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
