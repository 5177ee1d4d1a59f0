"""A rank that runs alone: what it takes part in, and where its layers and their serial parts begin and end."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train.bench.context_model import LayerTimes, PartTimes
from modeling_tnt.train.bench.context_trace import BEGIN, END, FIRST, LAST, MIDDLE, SEND, WAIT, Stamp, pass_times
from modeling_tnt.train.bench.context_trace import trace_step as trace

GLOBAL = "the state of the memory global of layer 0"
LOCAL = "the gradient of the state of the memory local0 of layer 0"
TAIL = "the last inputs of the convolution of layer 0"


def test_a_layer_is_cut_where_states_come_and_go():
    stamps = [
        Stamp(BEGIN, 0.0), Stamp(WAIT, 1.0, TAIL), Stamp(SEND, 2.0, TAIL), Stamp(WAIT, 3.0, GLOBAL),
        Stamp(SEND, 7.0, GLOBAL), Stamp(WAIT, 8.0, LOCAL), Stamp(SEND, 10.0, LOCAL), Stamp(END, 16.0),
    ]  # fmt: skip
    assert pass_times(stamps, ["global", "local0"]) == LayerTimes(3.0, (4.0, 3.0), 6.0)
    assert pass_times(stamps, []) == LayerTimes(0.0, (), 16.0)


def test_ranks_at_the_ends_ask_for_nothing_or_send_nothing():
    begin, end = Stamp(BEGIN, 0.0), Stamp(END, 9.0)
    assert pass_times([begin, Stamp(SEND, 5.0, GLOBAL), end], ["global"]) == LayerTimes(0.0, (5.0,), 4.0)
    assert pass_times([begin, Stamp(WAIT, 5.0, GLOBAL), end], ["global"]) == LayerTimes(5.0, (0.0,), 4.0)


def test_a_pass_is_the_mean_of_its_layers():
    stamps = [
        Stamp(BEGIN, 0.0), Stamp(WAIT, 1.0, GLOBAL), Stamp(SEND, 2.0, GLOBAL),
        Stamp(BEGIN, 4.0), Stamp(WAIT, 7.0, GLOBAL), Stamp(SEND, 9.0, GLOBAL), Stamp(END, 12.0),
    ]  # fmt: skip
    assert pass_times(stamps, ["global"]) == LayerTimes(2.0, (1.5,), 2.5)


@pytest.fixture(scope="module")
def model() -> TNTForCausalLM:
    torch.manual_seed(0)
    return TNTForCausalLM(TNTConfig.from_preset("tiny", num_hidden_layers=2, kernel_backend="torch"))


def run(model: TNTForCausalLM, rank: int, part: int, names: list[str], kept: dict) -> PartTimes:
    ids = torch.arange(3 * part).remainder(384)[None]
    tick = count()
    return trace(
        model, lambda: model(input_ids=ids, labels=ids).loss, part, rank, lambda: float(next(tick)), kept, names
    )  # fmt: skip


@pytest.mark.parametrize(("part", "names"), [(256, ["global"]), (40, ["global", "local0"])])
def test_every_kind_of_rank_runs_alone(model: TNTForCausalLM, part: int, names: list[str]):
    """The clock counts how often it is asked: states, and a convolution's inputs, are asked for and sent."""
    kept: dict[str, torch.Tensor] = {}
    tail, states = 2, 2 * len(names)
    for rank, ticks in ((FIRST, 1 + (tail + states) / 2), (MIDDLE, 1 + tail + states), (LAST, 1 + (tail + states) / 2)):
        model.zero_grad()
        found = run(model, rank, part, names, kept)
        assert found.forward.total == found.backward.total == ticks
        assert len(found.forward.serial) == len(found.backward.serial) == len(names)
        if rank == MIDDLE:
            assert found.forward.before == 1 + tail and found.forward.serial[0] == 1
            assert found.backward.before == 1 and found.backward.after == 1 + tail
        assert model.context_parallel is None
        grads = [parameter.grad for parameter in model.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
