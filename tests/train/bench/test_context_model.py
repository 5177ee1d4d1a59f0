"""The model of context parallel at its limits, where a formula says what must come out."""

from __future__ import annotations

import random

import pytest

from modeling_tnt.train.bench.context_model import (
    LayerTimes,
    Link,
    Meet,
    PartTable,
    PartTimes,
    Receive,
    Send,
    Work,
    simulate,
    simulate_step,
    useful_ranks,
)

AT_ONCE = Link(0.0, float("inf"))
LAYERS = 5


def part(before: float, serial: float, after: float, ends: float = 0.0, share: float = 1.0) -> PartTimes:
    """Of a backward pass that takes twice the forward's time, all of it multiplied by `share`."""
    forward = LayerTimes(share * before, (share * serial,), share * after)
    backward = LayerTimes(2 * share * after, (2 * share * serial,), 2 * share * before)
    return PartTimes(forward, share * ends, 2 * share * ends, backward)


def run(times: PartTimes, ranks: int, link: Link = AT_ONCE, size: int = 0, **more):
    return simulate_step([times] * ranks, LAYERS, [size], link, **more)


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_without_serial_parts_ranks_are_as_many_times_as_fast(ranks: int):
    whole, share = part(1.0, 0.0, 3.0, ends=2.0), part(1.0, 0.0, 3.0, ends=2.0, share=1 / ranks)
    found = run(share, ranks)
    assert whole.total(LAYERS) / found.seconds == pytest.approx(ranks)
    assert sum(found.received) == sum(found.met) == 0.0


def test_one_rank_waits_for_nobody_whatever_the_link():
    times = part(1.0, 0.5, 3.0, ends=2.0)
    found = run(times, 1, Link(9.0, 1e-3), size=100)
    assert found.seconds == pytest.approx(times.total(LAYERS)) and found.received == found.met == (0.0,)
    assert found.mean_wait == found.longest_wait == 0.0


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_equal_parts_lag_by_one_serial_part_a_rank_and_pass(ranks: int):
    """And by the way of one message: not once a layer. The first ranks wait at the meeting for those that lag."""
    times, link, size = part(1.0, 0.5, 3.0, ends=2.0), Link(0.01, 50.0), 4
    found = run(times, ranks, link, size)
    way, lag = 0.01 + 4 / 50.0, ranks - 1
    assert found.seconds == pytest.approx(times.total(LAYERS) + lag * (0.5 + way) + lag * (1.0 + way))
    backward = [r * (0.5 + way) + (lag - r) * (1.0 + way) for r in range(ranks)]
    assert found.received == pytest.approx(backward)
    assert found.met == pytest.approx([(lag - r) * (0.5 + way) for r in range(ranks)])


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_where_all_is_serial_it_is_a_pipeline_over_layers(ranks: int):
    whole, share = part(0.0, 1.0, 0.0), part(0.0, 1.0, 0.0, share=1 / ranks)
    found = run(share, ranks)
    assert whole.total(LAYERS) / found.seconds == pytest.approx(ranks * LAYERS / (LAYERS + ranks - 1))


def test_a_slow_link_delays_every_layer_only_if_messages_catch_up():
    """A link that needs longer for a message than a rank for a layer is what the step waits for."""
    times, link = part(1.0, 0.0, 0.0), Link(0.0, 1.0)
    found = simulate_step([times] * 2, LAYERS, [3], link)
    # Forward: the first message leaves after 1, one follows another every 3; backward: after 0, as nothing is before.
    assert found.seconds == pytest.approx((1 + 3 * LAYERS) + (3 * LAYERS + 2))


def test_two_states_of_a_layer_cross_one_behind_the_other():
    forward = LayerTimes(0.0, (1.0, 2.0), 0.0)
    times = PartTimes(forward, 0.0, 0.0, LayerTimes(0.0, (2.0, 1.0), 0.0))
    found = simulate_step([times] * 2, 1, [0, 0], AT_ONCE)
    # The second state of rank 0 leaves at 3, when rank 1 has had its first part since 2.
    assert found.seconds == pytest.approx(2 * 5.0)


def test_uneven_parts_wait_for_the_longest():
    long, short = part(2.0, 0.0, 0.0), part(1.0, 0.0, 0.0)
    found = simulate_step([long, short], LAYERS, [0], AT_ONCE)
    assert found.seconds == pytest.approx(long.total(LAYERS))
    nothing = simulate_step([long, part(0.0, 0.0, 0.0)], LAYERS, [0], AT_ONCE)
    assert nothing.seconds == pytest.approx(long.total(LAYERS))


@pytest.mark.parametrize(("speeds", "seconds"), [((), 12.0), ((1.0, 1.0), 24.0), ((1.0,), 48.0), ((1.0, 0.8), 30.0)])
def test_ranks_share_cores(speeds: tuple[float, ...], seconds: float):
    """Four ranks of twelve seconds each: alone, on two cores, on one, and on two that slow each other down."""
    found = simulate_step([part(4.0, 0.0, 0.0)] * 4, 1, [0], AT_ONCE, speeds)
    assert found.seconds == pytest.approx(seconds)


def test_a_rank_that_waits_leaves_its_core_to_the_others():
    programs = [[Work(3.0), Send("a", 1, 0)], [Receive("a"), Work(2.0)], [Work(3.0)]]
    found = simulate(programs, AT_ONCE, speeds=(1.0, 1.0))
    assert found.seconds == pytest.approx(5.0) and found.received == pytest.approx((0.0, 3.0, 0.0))
    assert simulate(programs, AT_ONCE, speeds=(1.0,)).seconds == pytest.approx(8.0)


def test_enough_cores_are_as_good_as_devices():
    draw = random.Random(0)
    parts = [part(draw.random(), draw.random(), draw.random(), draw.random()) for _ in range(6)]
    link = Link(0.05, 100.0)
    assert simulate_step(parts, LAYERS, [8], link, [1.0] * 6) == simulate_step(parts, LAYERS, [8], link)
    fewer = [simulate_step(parts, LAYERS, [8], link, [1.0] * n).seconds for n in (1, 2, 3, 6)]
    assert fewer == sorted(fewer, reverse=True)
    assert fewer[0] >= sum(times.total(LAYERS) for times in parts) - 1e-9


def by_recurrence(parts: list[PartTimes], layers: int, size: int, link: Link) -> float:
    """The same step written down as what every layer of every rank must wait for, with a device for each rank."""

    def one_pass(order: list[int], clock: list[float], layer_of: dict[int, LayerTimes]) -> None:
        free = [0.0] * len(parts)
        for _ in range(layers):
            there = 0.0
            for rank in order:
                times = layer_of[rank]
                begins = max(clock[rank] + times.before, there)
                ends = begins + times.serial[0]
                free[rank] = max(free[rank], ends) + size / link.bandwidth
                there, clock[rank] = free[rank] + link.latency, ends + times.after

    ranks = list(range(len(parts)))
    clock = [0.0] * len(parts)
    one_pass(ranks, clock, {r: parts[r].forward for r in ranks})
    meeting = max(c + p.ends_forward for c, p in zip(clock, parts, strict=True))
    clock = [meeting + p.ends_backward for p in parts]
    one_pass(ranks[::-1], clock, {r: parts[r].backward for r in ranks})
    return max(clock)


def test_any_parts_agree_with_the_recurrence():
    draw = random.Random(1)
    for _ in range(50):
        parts = [part(*(draw.random() for _ in range(4))) for _ in range(draw.randint(1, 7))]
        link, size = Link(draw.random() / 5, draw.choice([1.0, 10.0, 1e9])), draw.randint(0, 4)
        want = by_recurrence(parts, LAYERS, size, link)
        assert simulate_step(parts, LAYERS, [size], link).seconds == pytest.approx(want)


def test_programs_that_never_end_are_told():
    with pytest.raises(ValueError, match=r"ranks \[1\] wait for what nobody sends"):
        simulate([[Work(1.0)], [Receive("a")]], AT_ONCE)
    with pytest.raises(ValueError, match=r"ranks \[0\] wait"):
        simulate([[Meet()], []], AT_ONCE)


def test_times_between_known_lengths():
    table = PartTable((100, 200, 400), (part(1.0, 0.5, 0.0), part(2.0, 0.5, 0.0), part(4.0, 2.0, 0.0)))
    assert table.at(100) == table.times[0] and table.at(200) == table.times[1] and table.at(400) == table.times[2]
    assert table.at(150).forward.before == pytest.approx(1.5) and table.at(150).forward.serial == (0.5,)
    assert table.at(300).backward.serial == pytest.approx((2.5,))
    assert table.at(1000).total(3) == pytest.approx(2.5 * table.times[2].total(3))
    with pytest.raises(ValueError, match="length must be at least 100"):
        table.at(99)


def test_useful_ranks():
    speed_ups = {1: 1.0, 2: 1.9, 4: 3.2, 8: 4.0, 16: 7.0}
    assert (useful_ranks(speed_ups, 0.8), useful_ranks(speed_ups, 0.5), useful_ranks(speed_ups, 1.0)) == (4, 8, 1)
