"""`tnt bench`: from a benchmark's arguments to its exit status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..options import fail
from .arguments import DecodeBenchArguments, KernelBenchArguments, ModelBenchArguments
from .decode import run_decode
from .kernels import run_kernels
from .model import run_model


def run_bench_kernels(arguments: KernelBenchArguments) -> int:
    return _run("bench kernels", run_kernels, arguments)


def run_bench_model(arguments: ModelBenchArguments) -> int:
    return _run("bench model", run_model, arguments)


def run_bench_decode(arguments: DecodeBenchArguments) -> int:
    return _run("bench decode", run_decode, arguments)


def _run(command: str, run: Callable[[Any], int], arguments: Any) -> int:
    try:
        resolved = arguments.resolve()
    except (ValueError, TypeError) as error:
        return fail(command, error, status=2)
    try:
        return run(resolved)
    except OSError as error:
        return fail(command, error, status=1)
    except KeyboardInterrupt:
        return fail(command, "interrupted; what was measured is kept", status=130)
