"""The rules of every picture, on made-up numbers: ticks, letters that can be read, a whole legend, nothing covered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from modeling_tnt.train.bench.decode import save_decode_plot
from modeling_tnt.train.bench.kernels import save_kernel_plot
from modeling_tnt.train.bench.model import save_model_plot
from modeling_tnt.train.bench.rows import DecodeRow, KernelRow, ModelRow
from modeling_tnt.train.common import pictures
from modeling_tnt.train.common.pictures import LogTicks, short_count, without_outliers
from modeling_tnt.train.evaluation.chunks import ChunkCurve, ChunksTask
from modeling_tnt.train.evaluation.estimates import Estimate
from modeling_tnt.train.evaluation.perplexity import PerplexityTask
from modeling_tnt.train.evaluation.position import PositionCurve, PositionTask, position_edges
from modeling_tnt.train.evaluation.retrieval import Retrieval, RetrievalTask
from modeling_tnt.train.evaluation.scores import Scores
from modeling_tnt.train.loop.health import find_idle_memories
from modeling_tnt.train.loop.picture import exponential_mean, save_plot
from modeling_tnt.train.loop.state import Score, score_key
from modeling_tnt.train.reproduce.paper import ROWS
from modeling_tnt.train.reproduce.picture import Line, draw_table

MACHINE = "x86_64 CPU with a rather long name, 2 threads"
STAGES = ["stage1", "look_at_me", "a_at_b_chunks", "last"]


@pytest.fixture
def drawn(monkeypatch) -> Iterator[list[Figure]]:
    """The figures that are saved in a test, which are looked at when it is done."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (figures.append(self), path.touch()))
    yield figures
    assert figures
    for figure in figures:
        check(figure)


def check(figure: Figure) -> None:
    figure.canvas.draw()
    assert figure.get_figwidth() == pictures.WIDTH
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text()]
    assert all(t.get_fontsize() >= 8 for t in texts)  # 11 pixels, when the picture is 800 pixels wide
    boxes = {axes: axes.get_tightbbox() for axes in figure.axes}
    for one, other in combinations(boxes, 2):
        assert not _overlap(boxes[one], boxes[other]), (one.get_title(), other.get_title())
    for axes in figure.axes:
        _check_ticks(axes)
        assert figure.bbox.padded(2).containsx(boxes[axes].x0) and figure.bbox.padded(2).containsx(boxes[axes].x1)
    for part in figure.subfigs or [figure]:
        _check_legend(part, boxes)


def _check_ticks(axes: Axes) -> None:
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        low, high = sorted((low, high))
        ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        is_color_bar = axes.get_label() == "<colorbar>" and axis is axes.xaxis
        assert len(ticks) >= 2 or is_color_bar, (axes.get_title(), axis.axis_name)
        labels = [t.label1.get_window_extent() for t in ticks if t.label1.get_visible() and t.label1.get_text()]
        assert not any(_overlap(a, b) for a, b in combinations(labels, 2)), (axes.get_title(), axis.axis_name)


def _check_legend(part: FigureBase, boxes: dict) -> None:
    """All that is drawn looks like something that the legend names, and the legend covers no panel."""
    handles = {label: h for axes in part.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    legends = part.legends
    assert {text.get_text() for legend in legends for text in legend.get_texts()} == set(handles)
    assert not any(_overlap(legend.get_window_extent(), box) for legend in legends for box in boxes.values())
    assert not any(axes.get_legend() for axes in part.axes)
    looks = {_look(h[0] if isinstance(h, ErrorbarContainer) else h) for h in handles.values()}
    colors = {color for color, *_ in looks}
    for axes in part.axes:
        for line in axes.lines:
            is_cap = line.get_marker() in ("|", "_") and line.get_linestyle() == "None"
            assert _look(line) in looks or (is_cap and _look(line)[0] in colors), (axes.get_title(), _look(line))
        assert {_look(patch)[0] for patch in axes.patches} <= colors


def _look(artist: Line2D | Patch) -> tuple:
    if isinstance(artist, Patch):
        return (to_rgb(artist.get_edgecolor()),)
    return to_rgb(artist.get_color()), artist.get_linestyle(), artist.get_marker()


def _overlap(a, b) -> bool:
    return a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1


# ------------------------------------------------------------------------------------------------------------- pictures


def make_log(stages: list[str], *, ratio: float = 0.8, norm: float = 1.2, layers: int = 2) -> list[dict]:
    """30 steps of each stage, whose memories' inner losses fall to `ratio` of what they were."""
    log, tokens = [], 0
    for index, stage in enumerate(stages):
        if index > 0:
            name = score_key(stages[index - 1], at=stage)
            log.append(event_of(stage, 0, tokens, "validation", name=name, bits_per_byte=2.2, standard_error=None))
        for step in range(1, 31):
            tokens += 1000
            log.append(event_of(stage, step, tokens, "step", bits_per_byte=2 + 7 * math.exp(-tokens / 5000)))
            if step % 10 == 0:
                values = {"step_size": 0.1, "state_norm": norm, "loss_before": 2.0, "loss_after": 2.0 * ratio}
                memories = [f"layer{i}/{name}" for i in range(layers) for name in ("global", "local0")]
                log.append(
                    event_of(stage, step, tokens, "memory_health")
                    | {f"{memory}/{quantity}": value for memory in memories for quantity, value in values.items()}
                )
        name = score_key(stage)
        log.append(event_of(stage, 30, tokens, "validation", name=name, bits_per_byte=2.1, standard_error=0.1))
    return log


def event_of(stage: str, step: int, tokens: int, event: str, **values: object) -> dict:
    return {"event": event, "stage": stage, "step": step, "tokens": tokens, **values}


def make_scores(log: list[dict]) -> list[Score]:
    measured = [record for record in log if record["event"] == "validation"]
    return [Score("bigram", "bigram model", 3.4)] + [
        Score(r["name"], f"after {r['name']}", r["bits_per_byte"], 0.01) for r in measured
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stages", [["one"], STAGES, [f"stage{i}" for i in range(12)]], ids=len)
def test_a_run_of_any_number_of_stages_of_any_name(drawn, tmp_path: Path, stages: list[str]):
    log = make_log(stages)
    save_plot(tmp_path / "loss.png", log, make_scores(log))
    loss = drawn[0].axes[0]
    assert "steps, up to 7.73, lie above this picture" in loss.get_title()
    marks = [line for line in loss.lines if line.get_linestyle() == "None"]
    assert len(marks) == 2 * len(stages) - 1 and len({_look(m) for m in marks}) == len(marks)
    titles = [axes.get_title() for axes in drawn[0].axes[1:]]
    assert len(titles) == 3 and all("\ngood: " in title for title in titles)


def test_a_run_without_memories_and_one_that_diverged(drawn, tmp_path: Path):
    steps = [r for r in make_log(["one"]) if r["event"] == "step"]
    save_plot(tmp_path / "loss.png", steps, [])
    log = make_log(["one"])
    broken = [{k: None if k.endswith("loss_after") else v for k, v in record.items()} for record in log]
    save_plot(tmp_path / "loss.png", broken, [Score("after_one", "after one", math.nan)])


def test_memories_that_do_not_learn_are_warned_of():
    assert find_idle_memories(make_log(STAGES)) == []
    assert find_idle_memories([]) == []
    (sentence,) = find_idle_memories(make_log(["a", "b"], ratio=0.99))
    assert sentence.startswith("4 of 4 memories hardly learn while they read: the loss after an update is up to 0.990")
    assert sentence.endswith("(layer0/global, layer0/local0, layer1/global and 1 more)")
    # The end of the run decides; one reading, of a single row, does not.
    assert find_idle_memories(make_log(STAGES, ratio=0.99) + make_log(STAGES)) == []
    assert find_idle_memories(make_log(STAGES) + make_log(["a"], ratio=0.99)) == []
    (sentence,) = find_idle_memories(make_log(["a"], norm=1.0001))
    assert "4 of 4 memories have a state that never leaves its initial norm" in sentence
    log = [{k: None if k == "layer0/global/state_norm" else v for k, v in r.items()} for r in make_log(["a"])]
    assert find_idle_memories(log) == ["1 of 4 memories have numbers that are not finite (layer0/global)"]


def make_row_scores(seed: int, shift: float = 0.0) -> Scores:
    nats = 100 * (2 + shift) + 10 * torch.randn(40, generator=torch.Generator().manual_seed(seed)).double()
    return Scores(nats, torch.full((40,), 99.0), torch.full((40,), 100))


@pytest.mark.slow
@pytest.mark.parametrize("names", [["stage2"], ["stage2", "stage1", "llama"]], ids=len)
def test_pictures_of_an_evaluation(drawn, tmp_path: Path, names: list[str]):
    PerplexityTask().draw(tmp_path / "p.png", {name: make_row_scores(i, 0.3 * i) for i, name in enumerate(names)})
    edges = position_edges(1024)
    counts = torch.tensor([b - a for a, b in zip(edges[:-1], edges[1:], strict=True)])[None].expand(8, -1)
    fall = torch.linspace(3, 2, len(edges) - 1).double() + torch.rand(8, 1).double()
    PositionTask().draw(tmp_path / "q.png", {name: PositionCurve(edges, counts * (fall + i), counts) for i, name in
                                        enumerate(names)})  # fmt: skip
    sizes = {1: [1], 4: [4], 16: [16]}
    curves = {
        name: ChunkCurve(4, sizes, {size: make_row_scores(0, i + 0.01 * size) for size in sizes})
        for i, name in enumerate(names)
    }
    ChunksTask().draw(tmp_path / "c.png", curves)
    # On a scale of their own, where a model that is far worse does not squeeze them.
    own = next(axes for axes in drawn[-1].axes if axes.get_title().startswith("Loss minus that at a model's own"))
    assert max(map(abs, own.get_ylim())) < 0.4
    exact = torch.arange(40) % 3 == 0
    found = [
        Retrieval(n, n // 16, exact, torch.rand(40).double(), torch.linspace(0, 0.999, 40).double()) for n in (128, 512)
    ]
    RetrievalTask().draw(tmp_path / "r.png", dict.fromkeys(names, found))
    assert any(axes.get_label() == "<colorbar>" for axes in drawn[-1].axes)
    assert all("± 1 standard error" in figure.get_suptitle() for figure in drawn)


def test_no_model_is_left_out_for_want_of_a_colour(drawn, tmp_path: Path):
    names = [f"model{i}" for i in range(11)]
    scores = {name: make_row_scores(i, 0.1 * i) for i, name in enumerate(names)}
    ChunksTask().draw(
        tmp_path / "c.png", {name: ChunkCurve(4, {4: [4], 8: [8]}, {4: s, 8: s}) for name, s in scores.items()}
    )
    PerplexityTask().draw(tmp_path / "p.png", scores)
    curves, rows = (figure.axes[0].get_legend_handles_labels()[1] for figure in drawn)
    assert set(names) < set(curves) and {f"{name}: rows" for name in names} < set(rows)


def test_pictures_of_benchmarks(drawn, tmp_path: Path):
    ok = {"status": "ok", "batch": 1, "machine": MACHINE, "dtype": "fp32"}
    contexts = {"tnt": 4.9, "llama dynamic": 3.1, "llama static": 3.6}  # less than a decade
    rows = [
        DecodeRow(contender=name, length=n, ms_median=ms * (1 + n / 2**20), cache_bytes=2**20 + n, preset="tiny", **ok)
        for name, ms in contexts.items() for n in (1024, 16384, 2**20)
    ]  # fmt: skip
    save_decode_plot(tmp_path / "decode.png", rows)
    rows = [
        KernelRow(contender=name, length=n, tokens_per_second=speed * n, mode=mode, chunk_size=c, memory=memory, **ok)
        for name, speed, memory, chunks in (("torch", 30.0, "mlp", (8, 16)), ("flash", 900.0, None, (None,)))
        for mode in ("forward", "forward and backward") for n in (128, 256) for c in chunks
    ]  # fmt: skip
    save_kernel_plot(tmp_path / "kernels.png", rows, 16, 256)
    rows = [
        ModelRow(contender=name, length=n, tokens_per_second=speed, **ok)
        for name, speed in (("tnt", 3100.0), ("llama", 4300.0)) for n in (64, 128)
    ]  # fmt: skip
    save_model_plot(tmp_path / "model.png", rows, "tiny")


@pytest.mark.slow
def test_an_outlier_squeezes_no_row_of_table_3(drawn, tmp_path: Path):
    lines = [Line(key, Estimate(2.7 + 0.01 * i, 0.02), Estimate(0.01 * i, 0.01)) for i, key in enumerate(ROWS)]
    lines[0] = Line("llama", Estimate(3.3, 0.03), Estimate(0.63, 0.04), [3.28, 3.32])
    lines[1] = Line("titans-large", None, None, state="failed")
    draw_table(tmp_path / "table3.png", lines, scale="small")
    losses, differences, _ = drawn[0].axes
    assert losses.get_xlim()[1] < 3.1 and differences.get_xlim()[1] < 0.4
    assert {"3.300", "failed"} <= {text.get_text() for text in losses.texts}
    assert "± 2 standard errors" in drawn[0].get_suptitle()


# ------------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize(("low", "high"), [(3.1, 4.8), (0.9, 1.1), (2, 40), (1e-3, 1e5), (512, 513), (5, 5000)])
def test_a_logarithmic_axis_always_has_ticks(low: float, high: float):
    assert 2 <= len([x for x in LogTicks().tick_values(low, high) if low <= x <= high]) <= 12


def test_outliers_are_few_and_far():
    assert without_outliers([5, 1, 2, 3, 40]) == [5, 1, 2, 3]
    assert without_outliers([-90, 1, 2, 3, 4, 5, 6, 99]) == [1, 2, 3, 4, 5, 6]
    assert without_outliers([1, 2, 3, 4, 7, 7]) == [1, 2, 3, 4, 7, 7]
    assert without_outliers([1, 50, 99]) == [1, 50, 99]  # of so few, none
    assert without_outliers([1, 1, 1, 1, 9]) == [1, 1, 1, 1, 9] and without_outliers([]) == []


def test_a_mean_weighs_steps_by_their_age():
    values = torch.tensor([4.0, 2.0, 1.0]).numpy()
    decay = math.exp(-1 / 2)
    expected = (4 * decay**2 + 2 * decay + 1) / (decay**2 + decay + 1)
    assert exponential_mean(values, 2)[-1] == pytest.approx(expected) and exponential_mean(values, 2)[0] == 4


def test_short_counts():
    assert [short_count(n) for n in (1, 1000, 1024, 16384, 2**20)] == ["1", "1000", "1k", "16k", "1M"]
