"""What the memories of the presets should take on an H100: a prediction from the machine code. No GPU is needed.

    python tests/benchmarks/predict.py                                    # print the tables
    python tests/benchmarks/predict.py --write                            # and put them where they are read, see below
    python tests/benchmarks/predict.py --layers tnt-150m --json out.json  # one preset, and every call of it
    python tests/benchmarks/predict.py --parts                            # what context parallel is predicted from

A training step of every preset's memory layer runs on CPU tensors at full size, of which nothing large is computed; a
recorder notes every launch with its grid, and every operation of torch. Each kernel is compiled for sm_90 and
disassembled. Its hot loop runs in a model of one multiprocessor (`prediction/sm_model.py`), which gives the cycles of a
tile; how many tiles a program walks, and what it loads and stores, follow from Triton's own representation of the
kernel (`prediction/ttir.py`). The calls of `tnt bench kernels --quick` go the same way, among them `chunk_ttt_linear`
of flash-linear-attention where that package can be imported.

--parts: train/bench/predicted_parts.json, the times of parts of a row, from which `tnt bench context-parallel
--predict` says how far more ranks make a step faster. Recorded are whole layers, and embedding, head and loss.

--write: the same, PREDICTED.md beside this file, the first table of it in kernels/README.md, and
train/bench/predicted.json, from which `tnt bench kernels --quick` prints measured times beside predicted ones.

On two busy cores it took 294 s with all kernels in Triton's cache, and 827 s in one process with few of them there.
Without flash-linear-attention (the extra `benchmarks`) its rows say that it is missing: have it there for --write.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

sys.path.insert(0, str(Path(__file__).parent))  # aot and prediction, from wherever this is run

from aot import PRESETS  # noqa: E402
from prediction import parts  # noqa: E402
from prediction.card import ATTENTION_RATES, H100  # noqa: E402
from prediction.cases import (  # noqa: E402
    DTYPE,
    LAYERS,
    LENGTH,
    OPERATIONS,
    TOKENS,
    LayerCase,
    OperationCase,
    try_recording,
)
from prediction.recording import KernelCall, Recording  # noqa: E402
from prediction.timing import Predictor, Timing, compile_all  # noqa: E402

from modeling_tnt.train.bench import predicted_parts  # noqa: E402

TABLE = Path(__file__).with_name("PREDICTED.md")
ROOT = Path(__file__).parents[2]
README = ROOT / "kernels" / "README.md"
STORED = ROOT / "train" / "bench" / "predicted.json"
BEGIN, END = "<!-- predict.py --write: begin -->", "<!-- predict.py --write: end -->"


@dataclass
class Result:
    """A case with the timings of its calls, or the reason why there are none."""

    case: LayerCase | OperationCase
    timings: list[Timing]
    reason: str = ""

    @property
    def ms(self) -> float:
        return 1e3 * sum(timing.seconds for timing in self.timings)

    @property
    def moved(self) -> int:
        return sum(timing.moved for timing in self.timings)

    def launches(self) -> tuple[int, int]:
        """Of Triton and of torch."""
        kernels = sum(timing.kernel for timing in self.timings)
        return kernels, len(self.timings) - kernels

    def part(self, is_global: bool) -> Result:
        """The calls of the global memory, or of the local one."""
        return Result(self.case, [t for t in self.timings if ("::global" in t.operator) == is_global])


def predict_all(cases: Sequence[LayerCase | OperationCase], processes: int) -> list[Result]:
    """Record, compile and time every case."""
    recordings: list[tuple[Recording | None, str]] = []
    for case in cases:
        recordings.append(try_recording(lambda case=case: case.record(H100.target)))
        print(f"recorded {case}: {recordings[-1][1] or len(recordings[-1][0].calls)}", file=sys.stderr)
    calls = [c for recording, _ in recordings if recording for c in recording.calls if isinstance(c, KernelCall)]
    predictor = Predictor(H100, compile_all(calls, H100, processes))
    results = []
    for case, (recording, reason) in zip(cases, recordings, strict=True):
        timings: list[Timing] = []
        if recording is not None:
            try:
                timings = predictor.predict(recording.calls)
            except ValueError as error:
                reason = " ".join(str(error).split())[:300]
        results.append(Result(case, timings, reason))
    return results


# -- Tables ------------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# What the memories should take on an H100

**A prediction, not a measurement.** Made by `python tests/benchmarks/predict.py --write` with triton {triton} in
{seconds:.0f} s, without a GPU. Nothing of it is calibrated on a card: take cycles as ±40%, ratios of two rows as ±20%.
"""
ASSUMPTIONS = f"""\
## Assumptions

- {H100.name}: {H100.multiprocessors} multiprocessors at {H100.clock / 1e9:.3f} GHz (at its highest clock,
  {H100.highest_clock / 1e9:.2f} GHz, times bound by latency shrink to {H100.clock / H100.highest_clock:.0%}),
  {H100.bandwidth / 1e12:.2f} TB/s, {H100.bf16 / 1e12:.0f} TFLOP/s of bf16 and {H100.fp32 / 1e12:.0f} of float32;
  {1e6 * H100.launch:.0f} µs from one launch to the next, whether of Triton or of torch.
- {TOKENS:,} tokens in rows of {LENGTH:,}, {DTYPE} under autocast, forward and backward. Only what the memories'
  operators launch is counted: not the projections, convolution, gates, norms and copies around them, nor the optimizer.
- A kernel takes the longer of two times. Latency: waves × (tiles a program × cycles a tile + the rest of its code
  once). A wave is as many programs as fit on all multiprocessors at once, by registers, warps and shared memory.
  Memory: all bytes that its programs ask for, at full bandwidth; what a cache answers is not taken off, and masked rows
  count (half of a tile's rows at C = 8).
- The model issues in order and knows latencies and rates of units, barriers and the pipe of shared memory; every load
  from global memory takes 650 cycles, every spill 35. It has no caches, bank conflicts or real scheduler. The first
  program of a launch stands for all; a branch over more than 60 instructions is taken to jump; loops besides the hot
  one count once.
- Products of torch (cuBLAS): the longer of operations at the peak of their dtype and bytes at full bandwidth. Its other
  kernels: bytes. Share of the peak: operations that the mathematics needs (`train/common/costs.py`), not those of
  padded tiles.
- FlashAttention is **assumed**, not predicted: {ATTENTION_RATES[0] / 1e12:.0f} to {ATTENTION_RATES[1] / 1e12:.0f}
  TFLOP/s with heads of 64, forward and backward together.
- flash-linear-attention: all configurations of its autotuners are compiled, and the fastest by this model counts.
"""
_LAYER_COLUMNS = (
    "preset", "C", "local, ms", "global, ms", "together, ms", "tokens/s", "of bf16 peak", "launches: Triton + torch",
    "GB", "of it at full bandwidth, ms", "FlashAttention, ms", "times its speed",
)  # fmt: skip
_KERNEL_COLUMNS = (
    "kernel", "launches", "warps", "blocks an SM", "programs", "waves", "tiles", "cycles a tile", "ms", "GB",
    "bound by", "a warp waits for",
)  # fmt: skip
_OPERATION_COLUMNS = ("of", "memory", "C", "mode", "ms", "tokens/s", "launches: Triton + torch", "GB")


def render(results: Sequence[Result], seconds: float) -> str:
    """The whole table as Markdown."""
    layers = [r for r in results if isinstance(r.case, LayerCase)]
    operations = [r for r in results if isinstance(r.case, OperationCase)]
    parts = [INTRODUCTION.format(triton=triton.__version__, seconds=seconds)]
    if layers:
        parts += [f"## The memories of a layer\n\n{layer_table(layers)}"]
    if operations:
        text = "131,072 tokens, 12 heads of 64, shards of 2,048; `tnt bench kernels --quick` prints what is measured."
        parts += [f"## Calls of `tnt bench kernels --quick`\n\n{text}\n\n{operation_table(operations)}"]
    missing = [f"- {_title(r)}: {r.reason}" for r in results if not r.timings]
    if missing:
        parts += ["\n".join(["## Not predicted", "", *missing, ""])]
    parts += [ASSUMPTIONS]
    parts += [f"## {_title(r)}\n\n{kernel_table(r)}" for r in results if r.timings]
    return "\n".join(parts)


def layer_table(results: Iterable[Result]) -> str:
    """A row for each preset and chunk size."""
    rows = []
    for result in results:
        case, ms = result.case, result.ms
        if not result.timings:
            rows.append([case.name, case.chunk_size, "not predicted", *[""] * (len(_LAYER_COLUMNS) - 3)])
            continue
        attention = [1e3 * case.attention_operations() / rate for rate in reversed(ATTENTION_RATES)]
        outside = result.part(is_global=True)
        rows.append([
            case.name, case.chunk_size, f"{result.part(is_global=False).ms:.1f}",
            f"{outside.ms:.1f}" if outside.timings else "–", f"{ms:.1f}", _millions(TOKENS, ms),
            f"{case.operations() / (ms / 1e3) / H100.bf16:.1%}", _launches(result), f"{result.moved / 1e9:.1f}",
            f"{1e3 * result.moved / H100.bandwidth:.1f}", f"{attention[0]:.0f} to {attention[1]:.0f}",
            f"{attention[0] / ms:.1f} to {attention[1] / ms:.1f}",
        ])  # fmt: skip
    return _markdown(_LAYER_COLUMNS, rows, left=1)


def operation_table(results: Iterable[Result]) -> str:
    rows = []
    for result in results:
        case = result.case
        figures = ["not predicted", "", "", ""]
        if result.timings:
            tokens = _millions(case.arguments.tokens, result.ms)
            figures = [f"{result.ms:.2f}", tokens, _launches(result), f"{result.moved / 1e9:.1f}"]
        rows.append([case.contender, case.memory, case.chunk_size, case.mode, *figures])
    return _markdown(_OPERATION_COLUMNS, rows, left=2)


def kernel_table(result: Result) -> str:
    """A row for each kernel of a case, those that take longest first; its longest launch shows sizes and cycles."""
    groups: dict[tuple[str, bool], list[Timing]] = {}
    for timing in result.timings:
        groups.setdefault((timing.name, timing.kernel), []).append(timing)
    rows = []
    for (name, is_kernel), found in sorted(groups.items(), key=lambda item: -sum(t.seconds for t in item[1])):
        longest = max(found, key=lambda timing: timing.seconds)
        model = [""] * 6
        if is_kernel:
            model = [
                longest.warps,
                longest.blocks,
                longest.programs,
                longest.waves,
                longest.trips,
                f"{longest.cycles:,.0f}",
            ]
        ms, moved = 1e3 * sum(t.seconds for t in found), sum(t.moved for t in found)
        stalls = [f"{kind} {share:.0%}" for kind, share in list(longest.stalls.items())[:4]] if is_kernel else []
        title = name if is_kernel else f"torch: {name}"
        rows.append([title, len(found), *model, f"{ms:.2f}", f"{moved / 1e9:.2f}", longest.bound, ", ".join(stalls)])
    return _markdown(_KERNEL_COLUMNS, rows, left=1)


def _title(result: Result) -> str:
    case = result.case
    return f"{case.name}, C = {case.chunk_size}" if isinstance(case, LayerCase) else _describe(case)


def _describe(case: OperationCase) -> str:
    return f"{case.contender} {case.memory}, C = {case.chunk_size}, {case.mode}"


def _launches(result: Result) -> str:
    return " + ".join(map(str, result.launches()))


def _millions(tokens: int, ms: float) -> str:
    return f"{tokens / ms / 1e3:.1f}M"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[object]], left: int) -> str:
    """A table whose first `left` columns are text."""
    alignment = ["---"] * left + ["---:"] * (len(columns) - left)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (columns, alignment, *rows)) + "\n"


# -- Files -------------------------------------------------------------------------------------------------------------


def stored(results: Iterable[Result]) -> dict[str, object]:
    """What `tnt bench kernels --quick` reads: its calls by the fields of its rows."""
    entries = []
    for result in results:
        if isinstance(result.case, OperationCase) and result.timings:
            case, args = result.case, result.case.arguments
            ours, mlp = case.contender != "fla", case.memory == "mlp"
            entries.append({
                "contender": case.contender, "memory": case.memory, "mode": case.mode, "chunk_size": case.chunk_size,
                "tokens": args.tokens, "heads": args.heads, "head_dim": args.head_dim,
                "expansion": args.expansion if mlp else None, "shard_length": args.shard_length,
                "qk_projection": (args.qk_projection if mlp else "none") if ours else None, "dtype": args.dtype,
                "ms": round(result.ms, 3),
            })  # fmt: skip
    return {"card": H100.name, "clock_ghz": H100.clock / 1e9, "triton": triton.__version__, "predictions": entries}


def stored_parts(processes: int) -> dict[str, object]:
    """What `tnt bench context-parallel --predict` reads."""
    recordings = [parts.record_part(case, H100.target) for case in parts.cases()]
    calls = [call for recording in recordings for call in recording.recording.calls]
    predictor = Predictor(H100, compile_all((c for c in calls if isinstance(c, KernelCall)), H100, processes))
    timings = [predictor.predict(recording.recording.calls) for recording in recordings]
    presets = {}
    for preset in parts.PRESETS:
        kinds = {"whole": False, "middle": True}
        found = {kind: parts.part_times(recordings, timings, preset, middle) for kind, middle in kinds.items()}
        presets[preset] = {
            kind: [predicted_parts.to_entry(tokens, times) for tokens, times in of_kind.items()]
            for kind, of_kind in found.items()
        }
    return {"card": H100.name, "clock_ghz": H100.clock / 1e9, "triton": triton.__version__, "presets": presets}


def write_parts(processes: int) -> None:
    predicted_parts.STORED.write_text(json.dumps(stored_parts(processes), indent=1) + "\n", encoding="utf-8")


def everything(results: Iterable[Result]) -> list[dict[str, object]]:
    """For --json: every call of every case."""
    return [
        {"case": asdict(r.case), "reason": r.reason, "ms": r.ms, "calls": [asdict(t) for t in r.timings]}
        for r in results
    ]


def put_between_marks(text: str, inside: str) -> str:
    """`text` with what stands between the two marks replaced. Raises ValueError if they are not there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README} must have the lines {BEGIN} and {END}, between which the table goes")
    return f"{before}{BEGIN}\n{inside}\n{END}{after}"


def write(results: Sequence[Result], seconds: float) -> None:
    TABLE.write_text(render(results, seconds), encoding="utf-8")
    STORED.write_text(json.dumps(stored(results), indent=1) + "\n", encoding="utf-8")
    layers = layer_table(r for r in results if isinstance(r.case, LayerCase))
    README.write_text(put_between_marks(README.read_text(encoding="utf-8"), layers), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", choices=PRESETS, help="only layers of these presets, and no other calls")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="default: %(default)s, the cores there are"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every predicted call there")
    parser.add_argument("--parts", action="store_true", help="write the times of parts, and predict nothing else")
    parser.add_argument("--write", action="store_true", help="write the files named above; needs all layers")
    args = parser.parse_args(argv)
    if args.parts:
        write_parts(args.processes)
        return 0
    if args.write and args.layers is not None:
        parser.error("--write writes the whole table; leave out --layers")
    start = time.perf_counter()
    cases = [*LAYERS, *OPERATIONS] if args.layers is None else [c for c in LAYERS if c.preset in args.layers]
    results = predict_all(cases, args.processes)
    seconds = time.perf_counter() - start
    print(render(results, seconds))
    if args.json is not None:
        args.json.write_text(json.dumps(everything(results), indent=1), encoding="utf-8")
    if args.write:
        write(results, seconds)
        write_parts(args.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
