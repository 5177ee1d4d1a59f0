"""`tnt bench decode`: the step of one new token behind a long context, TNT's beside that of a Llama of equal size.

At each context all contenders, TNT with each of `--backends`, stand ready and are stepped in turns, so that what else
the machine does meets all of them; of the two steps of a turn the second is timed. A step is the forward of one token a
row, through transformers' own classes; on a GPU it is waited for.

The set-up does not read the whole context. A KV cache is filled with random keys and values: attention costs the same
whatever they are. TNT reads `--read` tokens (all of a shorter context) and its counters of tokens are then set to the
context: the step looks at nothing of the past but its state, which has one size. Chunks and shards end inside the
timed steps as they do in decoding. Attention of a hybrid gets random keys and values, too, for what it has not read.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache

from modeling_tnt import TNTForCausalLM
from modeling_tnt.attention import FULL
from modeling_tnt.cache import is_memory_layer, memory_cache_layers
from modeling_tnt.compat import named_cache
from modeling_tnt.kernels import BackendChoice, choose_step_backend

from ..common.machine import OtherProcesses
from ..common.models import build_llama
from ..common.pictures import COLORS, count_tokens, make_y_logarithmic, picture, short_count
from ..common.timing import OK, OUT_OF_MEMORY, Outcome, attempt, synchronize
from .arguments import DTYPES, DecodeBenchArguments
from .harness import Bench, run
from .measure import FEWEST_REPEATS, Timing
from .report import GIB, MIB, align, length_table, speed, spread
from .rows import DecodeRow, name_with_backend

TNT, DYNAMIC, STATIC = "tnt", "llama dynamic", "llama static"
LLAMAS = (DYNAMIC, STATIC)
WARM_UP = 3
MOST_STEPS = 200
SHARE_OF_FREE_MEMORY = 0.6


@dataclass
class CachedModel:
    """A model with a cache that stands at a context; `undo` takes a step back, where the cache can."""

    name: str
    model: PreTrainedModel
    cache: Cache
    cache_bytes: int
    undo: Callable[[], object]


def run_decode(arguments: DecodeBenchArguments) -> int:
    return run(DecodeBench, arguments)


class DecodeBench(Bench):
    """Steps of all models in turns, behind each context."""

    row_class = DecodeRow

    def __init__(self, args: DecodeBenchArguments):
        super().__init__(args)
        self.dtype = DTYPES[args.dtype]
        self.limit = args.memory_limit * GIB if args.memory_limit is not None else None
        torch.manual_seed(args.seed)
        self.models: dict[str, PreTrainedModel] = {}
        self.backends: dict[str, BackendChoice] = {}  # of the names that are TNT's
        for backend in args.backends:
            config, name = args.tnt_config(backend), name_with_backend(TNT, backend, args.backends)
            self.models[name] = self._ready(partial(TNTForCausalLM, config))
            layer = next(iter(self.models[name].memory_layers().values()))
            memory = next(iter(layer.memories().values()))
            self.backends[name] = choose_step_backend(backend, memory.params)
        if args.peer != "none":
            self.models |= dict.fromkeys(LLAMAS, self._ready(lambda: build_llama(config, max(args.contexts) + 1)))
        self.token = torch.ones(args.batch_size, 1, dtype=torch.int64, device=self.device)

    def _ready(self, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        with self.device:  # weights are drawn where they are needed, which takes no time on a GPU
            model = build()
        return model.to(self.dtype).eval()

    def rows(self) -> Iterator[DecodeRow]:
        for context in self.args.contexts:
            outcome = self.attempt(partial(self._measure, context))
            outcomes = outcome.value if outcome.status == OK else dict.fromkeys(self.models, outcome)
            rows = [self._row(name, context, outcomes[name]) for name in self.models]
            peers = [row.ms_median for row in rows if row.status == OK and row.contender in LLAMAS]
            for row in rows:
                yield replace(row, relative=row.ms_median / min(peers)) if row.status == OK and peers else row

    def _row(self, name: str, context: int, outcome: Outcome) -> DecodeRow:
        args = self.args
        lacked = outcome.status == OUT_OF_MEMORY and name in LLAMAS
        return self.row(
            outcome, contender=name, length=context, batch=args.batch_size, dtype=args.dtype, preset=args.preset,
            backend="" if name in LLAMAS else self.backends[name].name, parameters=self.models[name].num_parameters(),
            cache_bytes=self._needed_bytes(STATIC, context) if lacked else None,
        )  # fmt: skip

    @torch.no_grad()
    def _measure(self, context: int) -> dict[str, Outcome]:
        """What came of each model; caches that together go over the limit are left out."""
        outcomes: dict[str, Outcome] = {}
        ready: list[CachedModel] = []
        limit = self.limit if self.limit is not None else SHARE_OF_FREE_MEMORY * free_bytes(self.device)
        for name in self.models:
            needed = self._needed_bytes(name, context)
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

    def _prepare(self, name: str, context: int) -> CachedModel:
        model = self.models[name]
        if name not in LLAMAS:
            cache = self._read(model, context)
            growing = [layer for layer in cache.layers if not (is_memory_layer(layer) or layer.is_sliding)]
            return CachedModel(name, model, cache, _held_bytes(cache), lambda: [layer.crop(-1) for layer in growing])
        if name == DYNAMIC:
            cache = DynamicCache(config=model.config)
            undo: Callable[[], object] = lambda: cache.crop(-1)  # noqa: E731
        else:
            cache = StaticCache(config=model.config, max_cache_len=context + 1)
            undo = lambda: [layer.cumulative_length.sub_(1) for layer in cache.layers]  # noqa: E731
        self._fill(cache, model.config, context)
        return CachedModel(name, model, cache, _held_bytes(cache), undo)

    def _read(self, model: PreTrainedModel, context: int) -> Cache:
        """TNT's cache after reading, with its counters set to the context."""
        length = min(context, self.args.read)
        cache = DynamicCache(config=model.config)
        tokens = torch.randint(model.config.vocab_size, (self.args.batch_size, length), device=self.device)
        model(tokens, cache=cache, logits_to_keep=1)
        for layer in memory_cache_layers(cache):
            layer.advance(context - length)
            layer.memories = {
                name: state._replace(position=torch.full_like(state.position, context))
                for name, state in layer.memories.items()
            }
        for layer in (layer.window if is_memory_layer(layer) else layer for layer in cache.layers):
            if layer is not None:
                self._attend_to_more(layer, context - length)
        return cache

    def _attend_to_more(self, layer: Any, tokens: int) -> None:
        """Random keys and values behind those that an attention layer's cache holds; a window's only the last ones."""
        rows, heads, _, head_dim = layer.keys.shape
        made = min(tokens, layer.sliding_window) if layer.is_sliding else tokens
        layer.update(*self._random_keys((rows, heads, made, head_dim)))
        if layer.is_sliding:
            layer.cumulative_length += tokens - made

    def _random_keys(self, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        """And values."""
        keys, values = (torch.randn(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return keys, values

    def _fill(self, cache: Cache, config: LlamaConfig, context: int) -> None:
        shape = (self.args.batch_size, config.num_key_value_heads, context, config.head_dim)
        for i in range(config.num_hidden_layers):
            cache.update(*self._random_keys(shape), i)

    def _needed_bytes(self, name: str, context: int) -> int:
        """Of keys and values of all tokens, and of the copy that a DynamicCache makes of one layer at each token."""
        config = self.models[name].config
        per_layer = 2 * self.args.batch_size * config.num_key_value_heads * context * config.head_dim
        layers = config.num_hidden_layers if name in LLAMAS else config.layer_types.count(FULL)
        layers += 1 if layers and name != STATIC else 0
        return per_layer * layers * self.dtype.itemsize

    # ------------------------------------------------------------------------------------------------------------ steps

    def _step_in_turns(self, ready: Sequence[CachedModel]) -> dict[str, Outcome]:
        """Step all models one after the other, again and again; one that fails is left out from there on."""
        outcomes: dict[str, Outcome] = {}
        seconds: dict[str, list[float]] = {c.name: [] for c in ready}
        peaks: dict[str, int | None] = {}
        began, others = time.monotonic(), OtherProcesses()
        for i in range(WARM_UP + MOST_STEPS):
            if i == WARM_UP:
                began, others = time.monotonic(), OtherProcesses()
            enough = time.monotonic() - began > self.args.case_seconds * len(ready)
            if i >= WARM_UP + FEWEST_REPEATS and enough:
                break
            for candidate in ready:
                if candidate.name in outcomes:
                    continue
                try:
                    if i == WARM_UP - 1:
                        peaks[candidate.name] = self._peak_of_step(candidate)
                    else:
                        # Decoding has its weights at hand, but another's turn may have pushed them out of memory.
                        self._step(candidate)
                        seconds[candidate.name].append(self._step(candidate))
                except Exception as error:  # not `attempt` at once: it gives a GPU's memory back behind every call
                    outcomes[candidate.name] = attempt(partial(_raise, error), self.device)
        cpus_used_by_others = others.cpus()
        for candidate in ready:
            if candidate.name not in outcomes:
                times, peak = seconds[candidate.name][WARM_UP - 1 :], peaks[candidate.name]
                timing = Timing.of(times, peak, cpus_used_by_others=cpus_used_by_others)
                figures = timing.fields(self.args.batch_size) | {"cache_bytes": candidate.cache_bytes}
                outcomes[candidate.name] = Outcome(OK, value=figures)
        return outcomes

    def _step(self, candidate: CachedModel) -> float:
        synchronize(self.device)
        began = time.perf_counter()
        candidate.model(self.token, **named_cache(candidate.cache), use_cache=True)
        synchronize(self.device)
        took = time.perf_counter() - began
        candidate.undo()
        return took

    def _peak_of_step(self, candidate: CachedModel) -> int | None:
        """Bytes that a step needs beyond what is held before it: torch's on a GPU, resident ones on Linux."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._step(candidate)
            return torch.cuda.max_memory_allocated(self.device) - before
        give_free_memory_back()
        before = resident_bytes("VmRSS", reset_peak=True)
        self._step(candidate)
        peak = resident_bytes("VmHWM")
        return None if before is None or peak is None else max(0, peak - before)

    # ----------------------------------------------------------------------------------------------------------- report

    def facts(self) -> list[str]:
        args, llama = self.args, self.models.get(STATIC)
        peer = "none" if llama is None else f"Llama, {llama.num_parameters():,} parameters, sdpa attention"
        return [
            f"models    {args.preset}, {next(iter(self.models.values())).num_parameters():,} parameters, backend "
            + ", ".join(f"{choice.name} ({choice.reason})" for choice in self.backends.values()),
            f"peer      {peer}",
            f"steps     one token in {args.batch_size} rows, {args.dtype}, contenders in turns",
        ]

    def line(self, row: DecodeRow) -> str:
        return f"{row.contender}, {short_count(row.length)}: {spread(row)}"

    def tables(self, rows: Sequence[DecodeRow]) -> list[str]:
        has_peaks = any(row.peak_extra_bytes is not None for row in rows)
        return [
            f"step, ms: median (lowest-highest)\n{length_table(rows, spread)}",
            f"cache, MiB\n{length_table(rows, _cache)}",
            f"peak of a step beyond what is held, MiB\n{length_table(rows, _peak)}" if has_peaks else "",
        ]

    def conclusions(self, rows: Sequence[DecodeRow]) -> list[str]:
        return [summarize_decode(rows)]

    def draw(self, path: Path, rows: Sequence[DecodeRow]) -> None:
        save_decode_plot(path, rows)


def summarize_decode(rows: Sequence[DecodeRow]) -> str:
    """TNT's step as a multiple of the faster Llama's at each context, and of its own at the shortest one; a table for
    each backend that was compared."""
    ours: dict[str, list[DecodeRow]] = {}
    for row in rows:
        if row.contender not in LLAMAS and row.status == OK:
            ours.setdefault(row.contender, []).append(row)
    return "\n\n".join(map(_summarize_steps, ours.values())) or "TNT was not measured"


def _summarize_steps(ours: Sequence[DecodeRow]) -> str:
    first = min(ours, key=lambda row: row.length)
    lines = [["context", "to Llama's", "to its own at " + short_count(first.length)]]
    for row in ours:
        relative = "" if row.relative is None else f"{row.relative:.2f}"
        lines.append([short_count(row.length), relative, f"{row.ms_median / first.ms_median:.2f}"])
    backend = first.contender.removeprefix(TNT)
    return f"TNT's median step as a multiple{backend and f',{backend} backend'}\n{align(lines)}"


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


def _held_bytes(cache: Cache) -> int:
    """Of states, and of keys and values."""
    return sum(
        layer.nbytes if is_memory_layer(layer) else layer.keys.nbytes + layer.values.nbytes for layer in cache.layers
    )


def _raise(error: Exception) -> None:
    raise error


def _cache(row: DecodeRow) -> str:
    size = "" if row.cache_bytes is None else f"{row.cache_bytes / MIB:,.1f}"
    return size if row.status == OK else f"({size})" if size else speed(row)


def _peak(row: DecodeRow) -> str:
    if row.status != OK:
        return speed(row)
    return "" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / MIB:,.1f}"
