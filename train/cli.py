"""The `tnt` command."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from .bench.arguments import KernelBenchArguments, ModelBenchArguments
from .bench.decode import run_decode
from .bench.decode_arguments import DecodeBenchArguments
from .bench.kernels import run_kernels
from .bench.model import run_model
from .card_command import CardArguments, run_card
from .errors import NonFiniteError, OutOfMemory, TrainingStopped
from .evaluation.arguments import EvalArguments
from .evaluation.run import run_eval
from .options import Parser, add_flags, to_arguments
from .plan import find_missing_trackers, prepare
from .push_command import PushArguments, run_push
from .recipe import PRECISIONS, Recipe, available_recipes, load_recipe
from .reproduce.arguments import Table3Arguments
from .reproduce.run import run_table3
from .trainer import train


def main(argv: list[str] | None = None) -> int:
    """Run `tnt` with `argv` (by default the process's own) and return its exit status.

    0: done; 1: training stopped (a non-finite loss, no memory, a disk that is full), or a backend failed the
    benchmark's gate; 2: arguments or data that cannot be used; 130: interrupted from the keyboard; 143: by SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        recipe = _read_recipe(argv)
    except (ValueError, OSError) as error:
        return _fail("train", error, status=2)
    parsed = _build_parser(recipe).parse_args(argv)
    arguments = to_arguments(parsed)
    transformers_logging.disable_progress_bar()  # saving and loading a model of this size needs none of its own
    return parsed.run(arguments)


def _read_recipe(argv: list[str]) -> Recipe:
    """The recipe that `tnt train --config` names, whose fields and stages are the flags of that command."""
    if argv[:1] != ["train"]:
        return Recipe()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    name = parser.parse_known_args(argv[1:])[0].config
    return Recipe() if name is None else load_recipe(name)


def start_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate as the launcher configured it, with the recipe's precision and trackers.

    Where those break a rule the defaults are taken: `prepare` reports them, together with everything else.
    """
    precision = recipe.training.mixed_precision
    trackers = [] if find_missing_trackers(recipe) else recipe.output.trackers
    return Accelerator(
        mixed_precision=precision if precision in PRECISIONS else "no", log_with=trackers or None,
        project_dir=recipe.output.dir,
    )  # fmt: skip


def _run_train(recipe: Recipe) -> int:
    try:
        accelerator = start_accelerator(recipe)
        run = prepare(recipe, accelerator)
    except (ValueError, TypeError, OSError) as error:
        return _fail("train", error, status=2)
    except KeyboardInterrupt:
        return _fail("train", "interrupted before training began", status=130)
    try:
        train(run, accelerator)
    except (NonFiniteError, OutOfMemory, OSError, ValueError) as error:
        return _fail("train", error, status=1)
    except TrainingStopped as stopped:
        return _fail("train", stopped, status=143 if stopped.signal == signal.SIGTERM else 130)
    except KeyboardInterrupt:
        return _fail("train", f"interrupted; what was saved is kept in {run.folder.root}", status=130)
    return 0


def _run_bench_kernels(arguments: KernelBenchArguments) -> int:
    return _run_bench("bench kernels", run_kernels, arguments)


def _run_bench_model(arguments: ModelBenchArguments) -> int:
    return _run_bench("bench model", run_model, arguments)


def _run_bench_decode(arguments: DecodeBenchArguments) -> int:
    return _run_bench("bench decode", run_decode, arguments)


def _run_bench(command: str, run: Callable[[Any], int], arguments: Any) -> int:
    try:
        resolved = arguments.resolve()
    except (ValueError, TypeError) as error:
        return _fail(command, error, status=2)
    try:
        return run(resolved)
    except OSError as error:
        return _fail(command, error, status=1)
    except KeyboardInterrupt:
        return _fail(command, "interrupted; what was measured is kept", status=130)


def _build_parser(recipe: Recipe) -> Parser:
    parser = Parser(prog="tnt", description="TNT, Titans and TTT memories for transformers.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    trainer = _add_command(
        commands,
        "train",
        _run_train,
        recipe,
        help="train a model in stages",
        description="Train a model in stages: with the preset's chunk sizes, then a few steps with smaller local ones. "
        "Without arguments: the preset tiny, on the source files of Python's standard library. Flags replace what the "
        "recipe says; where one takes none, that is what it is called.",
    )
    trainer.usage = "tnt train [-h] [--config RECIPE] [--SECTION.FIELD VALUE ...]"
    trainer.add_argument(
        "--config", metavar="RECIPE", help=f"a YAML file, or one of {', '.join(available_recipes())}; its stages are "
        "the ones that have flags below",
    )  # fmt: skip
    _add_command(
        commands,
        "eval",
        run_eval,
        EvalArguments(),
        help="measure a saved model on held-out text",
        description="Perplexity and bits per byte, loss by position, sensitivity to the local chunk size and retrieval "
        "of values from text, each as JSON and PNG with standard errors, for any causal language model.",
    )
    _add_command(
        commands,
        "card",
        run_card,
        CardArguments(),
        help="write the model card of a saved model",
        description="Write the README.md of a saved model again, with results of tnt eval, a licence, or another "
        "template. What is not known is left out.",
    )
    _add_command(
        commands,
        "push",
        run_push,
        PushArguments(),
        help="send a saved model to the Hub",
        description="Check a saved model and send it to the Hugging Face Hub in one commit, with its code, tokenizer "
        "and card. Where the connection broke, the same command goes on.",
    )
    bench = commands.add_parser(
        "bench", help="measure speed and memory", description="Measure speed and memory.", allow_abbrev=False
    )
    benchmarks = bench.add_subparsers(dest="benchmark", required=True, metavar="benchmark")
    _add_command(
        benchmarks,
        "kernels",
        _run_bench_kernels,
        KernelBenchArguments(),
        help="the memory operations beside other packages' and attention",
        description="Check each backend of the memory operations against the reference, then time it beside "
        "flash-linear-attention, FlashAttention and titans-pytorch. On a CPU: small sizes. The exit status is 1 when a "
        "backend fails the check.",
    )
    _add_command(
        benchmarks,
        "model",
        _run_bench_model,
        ModelBenchArguments(),
        help="training steps of TNT, Titans and Llama",
        description="Time whole training steps (forward, backward, AdamW) of TNT at several chunk sizes beside Titans "
        "and a Llama of the same size, and say from which length on TNT is faster. On a CPU: small sizes.",
    )
    _add_command(
        benchmarks,
        "decode",
        _run_bench_decode,
        DecodeBenchArguments(),
        help="the next token behind a long context, TNT and Llama",
        description="Time the step of one new token, and count the bytes of its cache, behind contexts of 1,024 to "
        "1,048,576 tokens: a TNT model's, whose memories have one size, beside a Llama's of as many parameters with a "
        "KV cache, in turns. Llama's cache is filled with random keys and values, and TNT's memories have read "
        "--read tokens and are then told the position: neither changes what a step costs.",
    )
    reproduce = commands.add_parser(
        "reproduce", help="repeat an experiment of the paper", description="Repeat an experiment of the paper.",
        allow_abbrev=False,
    )  # fmt: skip
    experiments = reproduce.add_subparsers(dest="experiment", required=True, metavar="experiment")
    _add_command(
        experiments,
        "table3",
        run_table3,
        Table3Arguments(),
        help="the ablations of TNT and its baselines, trained side by side",
        description="Train the rows of the paper's table 3 (0 to 4 local memories, without the global memory, without "
        "the projection, with stage 2) and the baselines Titans, TTT and Llama on equal tokens with about as many "
        "parameters, with several seeds, and say which of the paper's orderings hold. Can be stopped: the same command "
        "goes on.",
    )
    return parser


def _add_command(
    commands: Any, name: str, run: Callable[[Any], int], arguments: Any, help: str, description: str
) -> Parser:
    parser = commands.add_parser(name, help=help, description=description, allow_abbrev=False)
    parser.set_defaults(run=run)
    add_flags(parser, arguments)
    return parser


def _fail(command: str, error: BaseException | str, status: int) -> int:
    print(f"\ntnt {command}: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
