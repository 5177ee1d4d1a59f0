"""`tnt bench decode`: the step of one new token behind a long context, TNT's beside that of a Llama of equal size.

At each context all contenders stand ready and are stepped in turns, so that what else the machine does meets all of
them; of the two steps of a turn the second is timed. A step is the forward of one token a row, through transformers'
own classes; on a GPU it is waited for.

The set-up does not read the whole context. A KV cache is filled with random keys and values: attention costs the same
whatever they are. TNT reads `--read` tokens (all of a shorter context) and its counters of tokens are then set to the
context: the step looks at nothing of the past but its state, which has one size. Chunks and shards end inside the
timed steps as they do in decoding.
"""

from __future__ import annotations

import ctypes
import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache

from modeling_tnt import TNTForCausalLM
from modeling_tnt.compat import named_cache
from modeling_tnt.kernels import choose_step_backend

from ..common.files import atomic_file
from ..common.machine import describe_machine, describe_versions
from ..common.models import build_llama
from ..common.pictures import COLORS, count_tokens, make_y_logarithmic, picture, short_count
from ..common.timing import OK, OUT_OF_MEMORY, Outcome, attempt, free_memory, synchronize
from ..options import to_mapping
from .arguments import DTYPES, DecodeBenchArguments
from .report import align, length_table, list_reasons, speed
from .rows import DecodeRow, timing_fields
from .session import Session
from .timing import FEWEST_REPEATS, Timing

GIB, MIB = 2**30, 2**20
TNT, DYNAMIC, STATIC = "tnt", "llama dynamic", "llama static"
WARM_UP = 3
MOST_STEPS = 200
SHARE_OF_FREE_MEMORY = 0.6


@dataclass
class Contender:
    """A model with a cache that stands at a context; `undo` takes a step back, where the cache can."""

    name: str
    model: PreTrainedModel
    cache: Cache
    cache_bytes: int
    undo: Callable[[], object]


def run_decode(args: DecodeBenchArguments) -> int:
    """Run the benchmark, print its report, and return the exit status 0.

    Args:
        args: resolved, see `DecodeBenchArguments.resolve`.
    """
    bench = DecodeBench(args)
    print(bench.describe(), flush=True)
    rows: list[DecodeRow] = []
    args.output.claim(args.results)
    try:
        for context in args.contexts:
            measured = bench.measure(context)
            rows += measured
            bench.save(rows)
            for row in measured:
                print(f"  {row.contender}, {short_count(context)}: {_milliseconds(row)}", flush=True)
    finally:
        if rows:  # what was measured before an interruption is reported, too
            print(f"\n{bench.report(rows)}", flush=True)
    return 0


class DecodeBench:
    """One run: the models, and what came of their steps behind each context."""

    def __init__(self, args: DecodeBenchArguments):
        self.args, self.device, self.dtype = args, torch.device(args.device), DTYPES[args.dtype]
        self.machine, self.versions = describe_machine(self.device), describe_versions()
        self.session = Session(args.time_limit, args.case_seconds)
        self.limit = args.memory_limit * GIB if args.memory_limit is not None else None
        config = args.tnt_config()
        torch.manual_seed(args.seed)
        self.tnt = self._ready(lambda: TNTForCausalLM(config))
        self.llama = None if args.peer == "none" else self._ready(lambda: build_llama(config, max(args.contexts) + 1))
        memory = next(iter(self.tnt.model.layers[0].memory.memories().values()))
        self.backend = choose_step_backend(args.backend, memory.params)
        self.token = torch.ones(args.batch_size, 1, dtype=torch.int64, device=self.device)

    def _ready(self, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        with self.device:  # weights are drawn where they are needed, which takes no time on a GPU
            model = build()
        return model.to(self.dtype).eval()

    def measure(self, context: int) -> list[DecodeRow]:
        """A row for each contender."""
        outcome = self.session.run("decode", context, lambda: Outcome(OK, value=self._measure(context)))
        free_memory(self.device)
        outcomes = outcome.value if outcome.status == OK else dict.fromkeys(self._names(), outcome)
        return self._rows(context, outcomes)

    @torch.no_grad()
    def _measure(self, context: int) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}
        ready: list[Contender] = []
        limit = self.limit if self.limit is not None else SHARE_OF_FREE_MEMORY * free_bytes(self.device)
        for name in self._names():
            needed = 0 if name == TNT else self._needed_bytes(name, context)
            if needed > limit:
                reason = f"a KV cache of {needed / GIB:.1f} GiB is over the limit of {limit / GIB:.1f} GiB"
                outcomes[name] = Outcome(OUT_OF_MEMORY, reason)
                continue
            outcome = attempt(lambda n=name: self._prepare(n, context), self.device)
            if outcome.status == OK:
                limit -= needed
                ready.append(outcome.value)
            else:
                outcomes[name] = outcome
        return outcomes | self._step_in_turns(ready)

    def _names(self) -> list[str]:
        return [TNT] if self.llama is None else [TNT, DYNAMIC, STATIC]

    # ------------------------------------------------------------------------------------------------------- caches

    def _prepare(self, name: str, context: int) -> Contender:
        if name == TNT:
            cache = self._read(context)
            return Contender(name, self.tnt, cache, sum(layer.nbytes for layer in cache.layers), lambda: None)
        if name == DYNAMIC:
            cache = DynamicCache(config=self.llama.config)
            undo: Callable[[], object] = lambda: cache.crop(-1)  # noqa: E731
        else:
            cache = StaticCache(config=self.llama.config, max_cache_len=context + 1)
            undo = lambda: [layer.cumulative_length.sub_(1) for layer in cache.layers]  # noqa: E731
        self._fill(cache, context)
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        return Contender(name, self.llama, cache, held, undo)

    def _read(self, context: int) -> Cache:
        """TNT's cache after reading, with its counters set to the context."""
        config, length = self.tnt.config, min(context, self.args.read)
        cache = DynamicCache(config=config)
        tokens = torch.randint(config.vocab_size, (self.args.batch_size, length), device=self.device)
        self.tnt(tokens, cache=cache, logits_to_keep=1)
        for layer in cache.layers:
            layer.advance(context - length)
            layer.memories = {
                name: state._replace(position=torch.full_like(state.position, context))
                for name, state in layer.memories.items()
            }
        return cache

    def _fill(self, cache: Cache, context: int) -> None:
        config: LlamaConfig = self.llama.config
        shape = (self.args.batch_size, config.num_key_value_heads, context, config.head_dim)
        for i in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            cache.update(keys, values, i)

    def _needed_bytes(self, name: str, context: int) -> int:
        """Of the cache, and of the copy that a DynamicCache makes of one layer at each token."""
        config: LlamaConfig = self.llama.config
        per_layer = 2 * self.args.batch_size * config.num_key_value_heads * context * config.head_dim
        layers = config.num_hidden_layers + (1 if name == DYNAMIC else 0)
        return per_layer * layers * self.dtype.itemsize

    # -------------------------------------------------------------------------------------------------------- steps

    def _step_in_turns(self, ready: Sequence[Contender]) -> dict[str, Outcome]:
        """Step all contenders one after the other, again and again; one that fails is left out from there on."""
        outcomes: dict[str, Outcome] = {}
        seconds: dict[str, list[float]] = {c.name: [] for c in ready}
        peaks: dict[str, int | None] = {}
        began = time.monotonic()
        for i in range(WARM_UP + MOST_STEPS):
            if i == WARM_UP:
                began = time.monotonic()
            enough = time.monotonic() - began > self.args.case_seconds * len(ready)
            if i >= WARM_UP + FEWEST_REPEATS and enough:
                break
            for contender in ready:
                if contender.name in outcomes:
                    continue
                try:
                    if i == WARM_UP - 1:
                        peaks[contender.name] = self._peak_of_step(contender)
                    else:
                        # Decoding has its weights at hand, but another's turn may have pushed them out of memory.
                        self._step(contender)
                        seconds[contender.name].append(self._step(contender))
                except Exception as error:  # not `attempt` at once: it gives a GPU's memory back behind every call
                    outcomes[contender.name] = attempt(partial(_raise, error), self.device)
        for contender in ready:
            times = seconds[contender.name][WARM_UP - 1 :]
            if contender.name not in outcomes:
                timing = Timing(median(times), min(times), max(times), len(times), peaks[contender.name], None)
                outcomes[contender.name] = Outcome(OK, value=(timing, contender.cache_bytes))
        return outcomes

    def _step(self, contender: Contender) -> float:
        synchronize(self.device)
        began = time.perf_counter()
        contender.model(self.token, **named_cache(contender.cache), use_cache=True)
        synchronize(self.device)
        took = time.perf_counter() - began
        contender.undo()
        return took

    def _peak_of_step(self, contender: Contender) -> int | None:
        """Bytes that a step needs beyond what is held before it: torch's on a GPU, resident ones on Linux."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._step(contender)
            return torch.cuda.max_memory_allocated(self.device) - before
        give_free_memory_back()
        before = resident_bytes("VmRSS", reset_peak=True)
        self._step(contender)
        peak = resident_bytes("VmHWM")
        return None if before is None or peak is None else max(0, peak - before)

    # ------------------------------------------------------------------------------------------------------- report

    def _rows(self, context: int, outcomes: dict[str, Outcome]) -> list[DecodeRow]:
        args, rows = self.args, []
        for name in self._names():
            outcome, figures = outcomes[name], {}
            model = self.tnt if name == TNT else self.llama
            if outcome.status == OK:
                timing, cache_bytes = outcome.value
                figures = timing_fields(timing, args.batch_size) | {"cache_bytes": cache_bytes}
            elif outcome.status == OUT_OF_MEMORY:
                figures = {"cache_bytes": self._needed_bytes(STATIC, context)} if name != TNT else {}
            rows.append(
                DecodeRow(
                    contender=name,
                    length=context,
                    batch=args.batch_size,
                    status=outcome.status,
                    reason=outcome.reason,
                    dtype=args.dtype,
                    machine=self.machine,
                    versions=self.versions,
                    preset=args.preset,
                    backend=self.backend.name if name == TNT else "",
                    parameters=model.num_parameters(),
                    **figures,
                )  # fmt: skip
            )
        peers = [row.ms_median for row in rows if row.status == OK and row.contender != TNT]
        return [
            replace(row, relative=row.ms_median / min(peers)) if row.status == OK and peers else row for row in rows
        ]

    def save(self, rows: Sequence[DecodeRow]) -> None:
        """Write decode.json, under its name only when it is complete."""
        facts: dict[str, Any] = {"arguments": to_mapping(self.args), "rows": [asdict(row) for row in rows]}
        with atomic_file(self.args.output_dir / "decode.json") as path:
            path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def describe(self) -> str:
        args = self.args
        peer = "none" if self.llama is None else f"Llama, {self.llama.num_parameters():,} parameters, sdpa attention"
        return (
            f"machine   {self.machine}; {self.versions}\n"
            f"models    {args.preset}, {self.tnt.num_parameters():,} parameters, backend {self.backend.name} "
            f"({self.backend.reason})\n"
            f"peer      {peer}\n"
            f"steps     one token in {args.batch_size} rows, {args.dtype}, contenders in turns\n"
            f"results   {args.output_dir}, seed {args.seed}\n"
        )

    def report(self, rows: Sequence[DecodeRow]) -> str:
        """Tables, ratios and reasons, as printed; the plot is written on the way."""
        save_decode_plot(self.args.output_dir / "decode.png", rows)
        parts = [
            self.describe(),
            f"step, ms: median (lowest-highest)\n{length_table(rows, _name, _milliseconds)}\n",
            f"cache, MiB\n{length_table(rows, _name, _cache)}\n",
        ]
        if any(row.peak_extra_bytes is not None for row in rows):
            parts.append(f"peak of a step beyond what is held, MiB\n{length_table(rows, _name, _peak)}\n")
        reasons = list_reasons(rows, _name)
        parts += [f"{reasons}\n"] if reasons else []
        parts.append(summarize_decode(rows))
        return "\n".join(parts)


def summarize_decode(rows: Sequence[DecodeRow]) -> str:
    """TNT's step as a multiple of the faster Llama's at each context, and of its own at the shortest one."""
    ours = [row for row in rows if row.contender == TNT and row.status == OK]
    if not ours:
        return "TNT was not measured"
    first = min(ours, key=lambda row: row.length)
    lines = [["context", "to Llama's", "to its own at " + short_count(first.length)]]
    for row in ours:
        relative = "" if row.relative is None else f"{row.relative:.2f}"
        lines.append([short_count(row.length), relative, f"{row.ms_median / first.ms_median:.2f}"])
    return f"TNT's median step as a multiple\n{align(lines)}"


def save_decode_plot(path: Path, rows: Sequence[DecodeRow]) -> None:
    """A PNG of the step's milliseconds, and of the cache's MiB, over the context."""
    first = rows[0]
    rows_of = f"{first.batch} row{'s' if first.batch > 1 else ''}"
    title = f"One token behind a context: {first.preset}, {rows_of}, {first.dtype}, {first.machine}"
    with picture(path, title, height=4.4) as figure:
        time, memory = figure.subplots(1, 2)
        for color, name in zip(COLORS, dict.fromkeys(row.contender for row in rows), strict=False):
            mine = sorted((row for row in rows if row.contender == name and row.status == OK), key=lambda r: r.length)
            # Dashed, as the Llama's two caches may lie on one line.
            style = {"color": color, "marker": "o", "label": name, "linestyle": "--" if name == STATIC else "-"}
            lengths = [row.length for row in mine]
            if mine:
                time.plot(lengths, [row.ms_median for row in mine], **style)
                memory.plot(lengths, [row.cache_bytes / MIB for row in mine], **style)
        for axes, ylabel in ((time, "ms a step (median)"), (memory, "MiB of cache")):
            axes.set(xlabel="tokens read before", ylabel=ylabel)
            count_tokens(axes, sorted({row.length for row in rows}))
            make_y_logarithmic(axes)


def free_bytes(device: torch.device) -> float:
    """Memory that is free: of the GPU, or of the machine where Linux tells; elsewhere no limit is known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return float("inf")
    return 1024 * int(re.search(r"^MemAvailable:\s+(\d+)", text, re.M).group(1))


def resident_bytes(field: str, reset_peak: bool = False) -> int | None:
    """VmRSS or VmHWM, the high-water mark, of this process, which Linux can reset; None elsewhere."""
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+)", text, re.M)
    return None if found is None else 1024 * int(found.group(1))


def give_free_memory_back() -> None:
    """What glibc keeps of freed memory would not be seen as needed again."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _raise(error: Exception) -> None:
    raise error


def _name(row: DecodeRow) -> str:
    return row.contender


def _milliseconds(row: DecodeRow) -> str:
    return f"{row.ms_median:.3g} ({row.ms_lowest:.3g}-{row.ms_highest:.3g})" if row.status == OK else speed(row)


def _cache(row: DecodeRow) -> str:
    size = "" if row.cache_bytes is None else f"{row.cache_bytes / MIB:,.1f}"
    return size if row.status == OK else f"({size})" if size else speed(row)


def _peak(row: DecodeRow) -> str:
    return (
        speed(row) if row.status != OK else "" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / MIB:,.1f}"
    )
