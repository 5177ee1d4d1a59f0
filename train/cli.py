"""The `tnt` command. A command's own modules are imported when it is the one that was asked for."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module, metadata
from typing import Any, NamedTuple

from .options import Parser, add_flags, fail, to_arguments
from .recipe import Recipe, available_recipes, load_recipe


class Command(NamedTuple):
    """A command. `arguments`, a dataclass whose fields are its flags, and `run`, which takes it and returns the exit
    status, are `module:name` in this package."""

    name: str
    arguments: str
    run: str
    help: str
    description: str


COMMANDS = (
    Command(
        "train",
        "recipe:Recipe",
        "train_command:run_train",
        help="train a model in stages",
        description="Train a model in stages: with the preset's chunk sizes, then a few steps with smaller local ones. "
        "Without arguments: the preset tiny, on the source files of Python's standard library. Flags replace what the "
        "recipe says; `none` unsets a value that may be left out.",
    ),
    Command(
        "eval",
        "evaluation.arguments:EvalArguments",
        "evaluation.run:run_eval",
        help="measure a saved model on held-out text",
        description="Perplexity and bits per byte, loss by position, sensitivity to the local chunk size and retrieval "
        "of values from text, each as JSON and PNG with standard errors, for any causal language model.",
    ),
    Command(
        "card",
        "hub.card_command:CardArguments",
        "hub.card_command:run_card",
        help="write the model card of a saved model",
        description="Write the README.md of a saved model again, with results of tnt eval, a licence, or another "
        "template. What is not known is left out.",
    ),
    Command(
        "push",
        "hub.push_command:PushArguments",
        "hub.push_command:run_push",
        help="send a saved model to the Hub",
        description="Check a saved model and send it to the Hugging Face Hub in one commit, with its code, tokenizer "
        "and card. Where the connection broke, the same command goes on.",
    ),
    Command(
        "bench kernels",
        "bench.arguments:KernelBenchArguments",
        "bench.kernels:run_kernels",
        help="the memory operations beside other packages' and attention",
        description="Check each backend of the memory operations against the reference, then time it beside "
        "flash-linear-attention, FlashAttention and titans-pytorch. On a CPU: small sizes. The exit status is 1 when a "
        "backend fails the check.",
    ),
    Command(
        "bench model",
        "bench.arguments:ModelBenchArguments",
        "bench.model:run_model",
        help="training steps of TNT, Titans and Llama",
        description="Time whole training steps (forward, backward, AdamW) of TNT at several chunk sizes beside Titans "
        "and a Llama of the same size, and say from which length on TNT is faster. On a CPU: small sizes.",
    ),
    Command(
        "bench decode",
        "bench.arguments:DecodeBenchArguments",
        "bench.decode:run_decode",
        help="the next token behind a long context, TNT and Llama",
        description="Time the step of one new token, and count the bytes of its cache, behind contexts of 1,024 to "
        "1,048,576 tokens: a TNT model's, whose memories have one size, beside a Llama's of as many parameters with a "
        "KV cache, in turns. Llama's cache is filled with random keys and values, and TNT's memories have read "
        "--read tokens and are then told the position: neither changes what a step costs.",
    ),
    Command(
        "bench context-parallel",
        "bench.arguments:ContextParallelBenchArguments",
        "bench.context_parallel:run_context_parallel",
        help="one sequence over several processes, measured and predicted",
        description="Start processes (gloo on CPUs, NCCL on GPUs) that share a sequence, and time forward and backward "
        "of a training step over each number of them: tokens/s, bytes that are sent a token, and the time that ranks "
        "wait for states, beside what a model of compute and wait predicts from one process. With --predict: what "
        "it says of GPUs, and the largest number of ranks that is still useful. The exit status is 1 when a process "
        "fails.",
    ),
    Command(
        "reproduce table3",
        "reproduce.arguments:Table3Arguments",
        "reproduce.run:run_table3",
        help="the ablations of TNT and its baselines, trained side by side",
        description="Train the rows of the paper's table 3 (0 to 4 local memories, without the global memory, without "
        "the projection, with stage 2) and the baselines Titans, TTT and Llama on equal tokens with about as many "
        "parameters, with several seeds, and say which of the paper's orderings hold. Can be stopped: the same command "
        "goes on.",
    ),
    Command(
        "reproduce retrieval",
        "reproduce.retrieval.arguments:RetrievalArguments",
        "reproduce.retrieval.run:run_retrieval",
        help="what attention adds to memories when values are to be found again",
        description="Train small models on documents of key-value lines: memories alone, with one layer of attention "
        "in four, Titans' MAG, MAL and MAC, and a Llama, with equal tokens and about as many parameters, and measure "
        "each with the retrieval of tnt eval. Can be stopped: the same command goes on.",
    ),
)
GROUPS = {
    "bench": ("benchmark", "measure speed and memory"),
    "reproduce": ("experiment", "repeat an experiment of the paper"),
}


def main(argv: list[str] | None = None) -> int:
    """Run `tnt` with `argv` (by default the process's own) and return its exit status.

    0: done; 1: training stopped (a non-finite loss, no memory, a disk that is full), or a backend failed the
    benchmark's gate; 2: arguments or data that cannot be used; 130: interrupted from the keyboard; 143: by SIGTERM.
    """
    try:
        command, arguments = parse(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        return fail("train", error, status=2)

    from transformers.utils import logging as transformers_logging

    import_module("modeling_tnt.auto")  # see modeling_tnt/__init__.py
    transformers_logging.disable_progress_bar()  # saving and loading a model of this size needs none of its own
    return _load(command.run)(arguments)


def parse(argv: list[str]) -> tuple[Command, Any]:
    """The command that was asked for and its arguments. Ends the process for flags that cannot be read.

    Raises ValueError or OSError for a recipe that cannot be read.
    """
    chosen = next((command for command in COMMANDS if argv[: len(command.name.split())] == command.name.split()), None)
    arguments = None if chosen is None else _default_arguments(chosen, argv)
    return chosen, to_arguments(_build_parser(chosen, arguments).parse_args(argv))


def _default_arguments(command: Command, argv: list[str]) -> Any:
    """The values that flags replace; of `tnt train` what --config names, whose stages have flags, too."""
    if command.name != "train":
        return _load(command.arguments)()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    name = parser.parse_known_args(argv[1:])[0].config
    return Recipe() if name is None else load_recipe(name)


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(f".{module}", __package__), attribute)


def _build_parser(chosen: Command | None, arguments: Any) -> Parser:
    """The parser of every command, with the flags of the chosen one."""
    parser = Parser(prog="tnt", description="TNT, Titans and TTT memories for transformers.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions that are installed")
    groups = {"": parser.add_subparsers(dest="command", required=True, metavar="command")}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            kind, help = GROUPS[group]
            above = groups[""].add_parser(group, help=help, description=f"{help.capitalize()}.", allow_abbrev=False)
            groups[group] = above.add_subparsers(dest=kind, required=True, metavar=kind)
        own = groups[group].add_parser(name, help=command.help, description=command.description, allow_abbrev=False)
        if command is chosen:
            add_flags(own, arguments)
            if name == "train":
                own.usage = "tnt train [-h] [--config RECIPE] [--SECTION.FIELD VALUE ...]"
                own.add_argument(
                    "--config", metavar="RECIPE", help=f"a YAML file, or one of {', '.join(available_recipes())}; its "
                    "stages are the ones that have flags below",
                )  # fmt: skip
    return parser


class _Version(argparse.Action):
    """Prints versions, without importing what has them."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # noqa: ANN001 (argparse's signature)
        versions = [f"{name} {metadata.version(name)}" for name in ("modeling-tnt", "torch", "transformers")]
        print(", ".join([*versions, f"Python {sys.version.split()[0]}"]))
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
