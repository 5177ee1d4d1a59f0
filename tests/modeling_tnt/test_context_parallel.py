"""Context parallelism: what the ranks of a group find together is what one process finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from context_parallel_cases import Found, new_model, plain
from context_parallel_programs import CASES
from context_parallel_workers import Ranks, launch, outcomes
from model_cases import HYBRIDS, SMALL, VARIANTS
from torch import Tensor

from modeling_tnt import TNTConfig
from modeling_tnt.cache import fast_weight_shapes
from modeling_tnt.context_parallel import boundary_bytes


@pytest.fixture(scope="module")
def folder_of(request, tmp_path_factory) -> Callable[[int], Path]:
    """The folder of the results of all cases that this run of pytest asks of so many ranks, which are started once."""
    wanted: dict[int, set[str]] = {}
    for item in request.session.items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if item.module is request.module and "size" in given:
            wanted.setdefault(given["size"], set()).add(given["name"])

    @cache
    def run(size: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        launch(folder, size, [name for name in CASES if name in wanted[size]])
        return folder

    return run


@cache
def in_one_process(name: str) -> Found:
    return CASES[name].run(Ranks())


def of_all_ranks(found: list[Found]) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """The means, and the columns side by side."""
    means = {}
    for name, first in found[0].mean.items():
        missing = [one.mean[name] is None for one in found]
        assert all(missing) or not any(missing), f"{name} is there on some ranks only: {missing} are without"
        means[name] = None if first is None else sum(one.mean[name] for one in found) / len(found)
    return means, {name: torch.cat([one.columns[name] for one in found], dim=1) for name in found[0].columns}


def _largest(t: Tensor) -> float:
    return t.double().abs().max().item() if t.numel() else 0.0


def differences(got: dict[str, Tensor | None], want: dict[str, Tensor | None], tolerance: float) -> list[str]:
    """What differs, in a list of lines.

    Of each tensor by `tolerance` times its largest entry. Where that is small, a hundredth of the largest of all: what
    is small is the rest of what has cancelled.
    """
    if got.keys() != want.keys():
        return [f"found {sorted(got.keys() ^ want.keys())} on one side only"]
    largest = {name: 0.0 if t is None else _largest(t) for name, t in want.items()}
    of_all, wrong = max(largest.values(), default=0.0), []
    for name, expected in want.items():
        actual, scale = got[name], max(largest[name], of_all / 100)
        if expected is None:  # as of a batch of padding
            if actual is not None and actual.any():
                wrong.append(f"{name}: a gradient, and none of one process")
        elif actual is None:
            wrong.append(f"{name}: no gradient, unlike one process")
        elif actual.shape != expected.shape or actual.dtype != expected.dtype:
            wrong.append(f"{name}: {actual.dtype} {tuple(actual.shape)}, not {expected.dtype} {tuple(expected.shape)}")
        elif not expected.is_floating_point():
            if not torch.equal(actual, expected):
                wrong.append(f"{name}: {actual.tolist()}, not {expected.tolist()}")
        elif not (error := _largest(actual - expected)) <= tolerance * scale:  # true of NaN, too
            wrong.append(f"{name}: off by {error:.2e}, largest entry {largest[name]:.2e}")
    return wrong


@pytest.mark.parametrize(
    ("size", "name"),
    [
        pytest.param(size, name, marks=[] if size == 2 and case.fast else [pytest.mark.slow])
        for size in (2, 3, 4)
        for name, case in CASES.items()
        if size in case.sizes
    ],
)
def test_ranks_find_what_one_process_finds(size: int, name: str, folder_of):
    found, case = outcomes(folder_of(size), size, name, CASES[name].dead), CASES[name]
    if case.tolerance is None:
        return  # its ranks have checked it themselves
    expected = in_one_process(name)
    wrong = []
    for rank, one in enumerate(found):
        wrong += [f"rank {rank}: {line}" for line in differences(one.every, expected.every, case.tolerance)]
    means, columns = of_all_ranks(found)
    wrong += [f"mean: {line}" for line in differences(means, expected.mean, case.tolerance)]
    wrong += [f"columns: {line}" for line in differences(columns, expected.columns, case.tolerance)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in HYBRIDS])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_bytes_of_a_cut(variant: str, rows: int):
    """Those of the README: by the numbers of each state, and by where in its chunks and shards the cut is."""
    config = TNTConfig(**SMALL | VARIANTS[variant])
    weights = rows * sum(math.prod(shape) for shape in fast_weight_shapes(config).values())
    of_a_state = 2 * weights if config.use_momentum else weights
    projection = rows * config.num_heads * config.head_dim**2
    for position in range(1, 50):
        numbers = {}
        if config.conv_kernel_size:
            numbers["conv"] = rows * (config.conv_kernel_size - 1) * 3 * config.num_heads * config.head_dim
        if config.global_chunk_size is not None:
            numbers["global"] = of_a_state + weights * (position % config.global_chunk_size > 0)
        for i, (chunk, shard) in enumerate(zip(config.local_chunk_sizes, config.shard_lengths, strict=True)):
            inside = position % chunk > 0
            has_projection = {"shard": True, "chunk": inside, "none": False}[config.qk_projection]
            if shard is None or position % shard:
                numbers[f"local{i}"] = of_a_state + weights * inside + projection * has_projection
        assert boundary_bytes(config, position, rows) == {name: 4 * n for name, n in numbers.items()}
    doubled = boundary_bytes(config, 49, rows, torch.float64)
    assert doubled == {name: 2 * n for name, n in boundary_bytes(config, 49, rows).items()}


def test_what_crosses_a_cut_matters():
    """Ranks that passed nothing on would find other logits by far more than the tolerance."""
    ids = plain(2, 64)["input_ids"]
    with torch.no_grad():
        for name, cut in (("mlp", 32), ("global-only", 32), ("linear-plain-two-locals", 30)):
            model = new_model(name)
            assert (model(ids).logits[:, cut:] - model(ids[:, cut:]).logits).abs().max() > 0.01


def test_a_model_of_one_process_says_so():
    model = new_model("mlp")
    assert model.context_parallel is None
    with pytest.raises(ValueError, match="accelerate launch or torchrun"):
        model.enable_context_parallel(None)
    with model.pause_context_parallel():
        model.disable_context_parallel()
    assert model.context_parallel is None and model.model.context_parallel is None
