"""Speed and memory of one local memory, forward and backward, beside PyPI's `titans-pytorch`.

    python tests/benchmarks/bench_memory.py                                        # both, chunks of 16 and of 64
    python tests/benchmarks/bench_memory.py --only ours --length 65536 --chunk-sizes 16 1 --repeats 1
    python tests/benchmarks/bench_memory.py --only ours --device cuda --length 16384
    python tests/benchmarks/bench_memory.py --backends torch auto        # ours with each, in turns with all the others

What is timed is one training step of a memory *layer*, `loss = mean(o²)`, gradients of the input and of every
parameter, for an input [B, T, H·D] in float32. The contenders, alternating in one process (A, B, A, B, …):

  operation   `local_memory` alone, on given q, k, v and step sizes: what the share of the matmul rate is about.
  ours        the layer below around it: plain gradient descent, reset every `--shard-length` tokens, read at the
              projected query. Gradients of a chunk are taken at that chunk's start.
  ours+gates  the same with momentum and decay, which the peer has too.
  peer        `NeuralMemory(dim=H·D, heads=H, dim_head=D, chunk_size=C, batch_size=64)`: its weights are updated, and
              its gradients taken, once every `batch_size` tokens, its momentum and decay once every C: it never resets.
              Without batch_size all gradients would be taken at the initial weights, in parallel: another model.

Around both memories stand the same parts, namely the peer's: two RMS norms, projections to q, k, v, a step size (and
momentum and decay) per token and head, a gate per head, an output projection. The memory is an MLP of `--expansion`
with the residual norm for both; the peer's own default expansion is 4: see --peer-expansion.

Memory is measured in a fresh process per contender: the high-water mark of resident memory during one step, less what
was resident before it, after a small step has warmed up libraries and thread pools. Linux can reset that mark (write
"5" to /proc/self/clear_refs), so nothing that importing needed is counted or hidden, which `ru_maxrss` cannot promise.

Before it and while it measures the script looks how many CPUs other processes keep busy, and says so when that is too
much for its numbers to mean something.

Operations are counted by `operations` below, and the share is that of the best float32 `torch.mm` in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_tnt.kernels import BACKENDS, MemoryParams, choose_backend, local_memory
from modeling_tnt.train.common.machine import OtherProcesses, describe_others, look_around

PEER = "titans_pytorch"
CONTENDERS = ("operation", "ours", "ours+gates", "peer")
MIB = 2**20


class Contender(NamedTuple):
    """One of CONTENDERS, with its backend unless it is the peer."""

    name: str
    backend: str | None


class MemoryLayer(nn.Module):
    """The parts of the peer's layer around our memory: norms, projections, gates."""

    def __init__(self, args: argparse.Namespace, chunk_size: int, gates: bool, backend: str):
        super().__init__()
        H, D, M = args.heads, args.head_dim, args.head_dim * args.expansion
        dim = H * D
        self.shape = (H, D)
        self.options = {
            "chunk_size": chunk_size,
            "shard_length": args.shard_length or None,
            "qk_projection": args.qk_projection,
            "backend": backend,
        }
        self.read_norm, self.write_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.to_lr, self.to_gate = nn.Linear(dim, H), nn.Linear(dim, H, bias=False)
        self.to_momentum, self.to_decay = (nn.Linear(dim, H) if gates else None for _ in range(2))
        self.w1 = nn.Parameter(torch.randn(H, D, M) * D**-0.5)
        self.w2 = nn.Parameter(torch.randn(H, M, D) * M**-0.5)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(H, D)), nn.Parameter(torch.zeros(H, D))

    def params(self) -> MemoryParams:
        return MemoryParams(self.w1, w2=self.w2, norm_weight=self.norm_weight, norm_bias=self.norm_bias)

    def forward(self, x: Tensor) -> Tensor:
        read, write = self.read_norm(x), self.write_norm(x)
        q, k, v = (
            f(y).unflatten(-1, self.shape) for f, y in ((self.to_q, read), (self.to_k, write), (self.to_v, write))
        )
        o, _ = local_memory(
            q,
            F.normalize(k, dim=-1),
            v,
            0.1 * self.to_lr(write).sigmoid(),
            self.params(),
            momentum=self.to_momentum(write).sigmoid() if self.to_momentum else None,
            decay=0.1 * self.to_decay(write).sigmoid() if self.to_decay else None,
            **self.options,
        )
        return self.to_out((o * self.to_gate(read).sigmoid().unsqueeze(-1)).flatten(-2))


def make_step(contender: Contender, args: argparse.Namespace, chunk_size: int) -> Callable[[int], None]:
    """One training step as a function of the number of tokens."""
    name = contender.name
    torch.manual_seed(0)
    dim = args.heads * args.head_dim
    if name == "peer":
        from titans_pytorch import NeuralMemory

        memory = NeuralMemory(
            dim=dim,
            heads=args.heads,
            dim_head=args.head_dim,
            chunk_size=chunk_size,
            batch_size=64,
            default_model_kwargs={"depth": 2, "expansion_factor": float(args.peer_expansion or args.expansion)},
        ).to(args.device)

        def layer(x: Tensor) -> Tensor:
            return memory(x)[0]

        parameters = list(memory.parameters())
    else:
        memory = MemoryLayer(args, chunk_size, gates=name == "ours+gates", backend=contender.backend).to(args.device)
        if name == "operation":
            return operation_step(args, memory)
        layer, parameters = memory, list(memory.parameters())
    inputs = {}

    def step(length: int) -> None:
        if length not in inputs:
            inputs[length] = torch.randn(args.batch, length, dim, device=args.device).requires_grad_()
        x = inputs[length]
        layer(x).square().mean().backward()
        for t in (x, *parameters):
            t.grad = None

    return step


def operation_step(args: argparse.Namespace, layer: MemoryLayer) -> Callable[[int], None]:
    """The layer's memory without what is around it."""
    params = layer.params()
    inputs = {}

    def step(length: int) -> None:
        if length not in inputs:
            qkv = torch.randn(3, args.batch, length, *layer.shape, device=args.device)
            lr = 0.1 * torch.rand(args.batch, length, args.heads, device=args.device)
            inputs[length] = [t.requires_grad_() for t in (qkv[0], F.normalize(qkv[1], dim=-1), qkv[2], lr)]
        o, _ = local_memory(*inputs[length], params, **layer.options)
        o.square().mean().backward()
        for t in (*inputs[length], *layer.parameters()):
            t.grad = None

    return step


def operations(args: argparse.Namespace, chunk_size: int, contender: str) -> int:
    """Floating-point operations of one step, forward and backward, two per multiply-add.

    Per token and head of width D with an MLP of width M, in chunks of C tokens, counted from the matrix products of
    the dual form as dense products; elementwise work and the gates' recurrence are not counted, nor is anything that an
    implementation computes twice beyond the recomputation named here.

      C × D × M products: forward 7 (K W1, A W2, Δ2 W2ᵀ; X W1, H W2; the updates Kᵀ Δ1, Aᵀ Δ2), recomputed 5,
        backward 14: 26 of 2·D·M. Momentum adds forward 4 (X S1, H S2, two updates), recomputed 2, backward 8: 40.
      C × C products: forward X Kᵀ, H Aᵀ and two that apply them to Δ, recomputed, and 8 backward: 16·C·(D + M).
      Q-K projection: forward Q M, Kᵀ K: 4·D², Q Kᵀ and its use: 4·C·D; backward 6·D² and 10·C·D.
      Around the memory (not for "operation"): four projections of the whole width H·D, 6·H·D² each per head.
    """
    D, M, C = args.head_dim, args.head_dim * args.expansion, chunk_size
    per_token = (40 if contender == "ours+gates" else 26) * 2 * D * M + 16 * C * (D + M)
    if args.qk_projection != "none":
        per_token += 10 * D * D + 14 * C * D
    if contender != "operation":
        per_token += 4 * 6 * args.heads * D * D
    return per_token * args.batch * args.length * args.heads


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(fn: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - start


def matmul_rate(device: str) -> float:
    """The best float32 rate of a square `torch.mm`, in operations per second."""
    best = 0.0
    for n in (1024, 2048):
        a, b = torch.randn(2, n, n, device=device)
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
        best = max(best, *(2 * n**3 / seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(5)))  # noqa: B023
    return best


def check_ours(contender: Contender, args: argparse.Namespace, chunk_size: int) -> None:
    """Time only what is right: output and gradients of a short call against the reference, in float32."""
    results = []
    for backend in (contender.backend, "reference"):
        torch.manual_seed(0)
        layer = MemoryLayer(args, chunk_size, contender.name == "ours+gates", backend).to(args.device)
        x = torch.randn(1, min(chunk_size + 5, 24), args.heads * args.head_dim, device=args.device).requires_grad_()
        o = layer(x)
        results.append([o.detach(), *torch.autograd.grad(o.square().mean(), [x, *layer.parameters()])])
    for got, want in zip(*results, strict=True):
        error = ((got - want).abs().max() / want.abs().max()).item()
        if not error < 1e-3:  # float32 rounding amplified by the norm stays below 1e-4
            raise RuntimeError(
                f"backend={contender.backend!r} is wrong by {error:.1e} at chunk size {chunk_size}; not timed"
            )


def status_bytes(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M).group(1))


def measure_peak(contender: Contender, args: argparse.Namespace, chunk_size: int) -> int:
    """Bytes that one step needs beyond what is resident before it. Run in a fresh process."""
    step = make_step(contender, args, chunk_size)
    step(min(128, args.length))
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(args.length)
        return torch.cuda.max_memory_allocated() - before
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(args.length)
    return status_bytes("VmHWM") - before


def peak_in_a_fresh_process(contender: Contender, chunk_size: int, argv: list[str]) -> int | None:
    """None if the process failed, for example for want of memory; its message is passed on."""
    what = [contender.name, contender.backend or "none", str(chunk_size)]
    command = [sys.executable, __file__, *argv, "--measure-peak-of", *what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"  {' '.join(what)}: peak memory not measured: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    return int(done.stdout.split()[-1])


def run_chunk_size(
    args: argparse.Namespace, contenders: list[Contender], chunk_size: int, argv: list[str]
) -> list[dict]:
    for contender in contenders:
        if contender.name.startswith("ours"):
            check_ours(contender, args, chunk_size)
    steps = {contender: make_step(contender, args, chunk_size) for contender in contenders}
    for step in steps.values():
        step(min(args.length, 512))
    times: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    others = OtherProcesses()
    for _ in range(args.repeats):
        for contender, step in steps.items():
            times[contender].append(seconds(lambda: step(args.length), args.device))  # noqa: B023
    cpus_used_by_others = others.cpus()
    rows = []
    for contender in contenders:
        tokens_per_second = [args.batch * args.length / t for t in times[contender]]
        row = {
            "contender": contender.name,
            "backend": contender.backend,
            "chunk_size": chunk_size,
            "tokens_per_second": statistics.median(tokens_per_second),
            "tokens_per_second_lowest": min(tokens_per_second),
            "tokens_per_second_highest": max(tokens_per_second),
            "cpus_used_by_others": cpus_used_by_others,
        }
        if contender.name != "peer":
            row["operations"] = operations(args, chunk_size, contender.name)
            row["operations_per_second"] = row["operations"] / statistics.median(times[contender])
        if not args.no_peak:
            row["peak_bytes"] = peak_in_a_fresh_process(contender, chunk_size, argv)
        rows.append(row)
    return rows


def report(rows: list[dict], rate: float) -> None:
    head = (
        "C", "contender", "tokens/s: median (lowest-highest)", "x peer", "x first", "GFLOP/s", "share", "peak MiB",
        "of peer",
    )  # fmt: skip
    line = "{:>4} {:<20} {:>36} {:>7} {:>7} {:>8} {:>6} {:>9} {:>8}"
    print(line.format(*head))
    for row in rows:
        # The operation alone does less than the peer's layer, so it is not compared with it.
        peer = (
            None
            if row["contender"] == "operation"
            else next((r for r in rows if r["contender"] == "peer" and r["chunk_size"] == row["chunk_size"]), None)
        )
        speed = (
            f"{row['tokens_per_second']:,.0f} "
            f"({row['tokens_per_second_lowest']:,.0f}-{row['tokens_per_second_highest']:,.0f})"
        )
        ratio = f"{row['tokens_per_second'] / peer['tokens_per_second']:.2f}" if peer else ""
        label = " ".join(filter(None, (row["contender"], row["backend"])))
        # The same contender with the backend that was named first.
        first = next(r for r in rows if all(r[key] == row[key] for key in ("contender", "chunk_size")))
        gain = "" if first is row else f"{row['tokens_per_second'] / first['tokens_per_second']:.2f}"
        flops = share = memory = of_peer = ""
        if "operations_per_second" in row:
            flops = f"{row['operations_per_second'] / 1e9:.1f}"
            share = f"{row['operations_per_second'] / rate:.0%}"
        if row.get("peak_bytes"):
            memory = f"{row['peak_bytes'] / MIB:,.0f}"
            of_peer = f"{row['peak_bytes'] / peer['peak_bytes']:.3f}" if peer and peer.get("peak_bytes") else ""
        print(line.format(row["chunk_size"], label, speed, ratio, gain, flops, share, memory, of_peer))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--expansion", type=int, default=2)
    parser.add_argument("--shard-length", type=int, default=512, help="0: never reset")
    parser.add_argument("--qk-projection", choices=("shard", "chunk", "none"), default="shard")
    parser.add_argument("--peer-expansion", type=int, help="another expansion for the peer, such as its default, 4")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--only", choices=("ours", "peer"), help="leave the others out")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["auto"], help="of ours, in turns")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peak", action="store_true", help="do not measure peak memory")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--measure-peak-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.backends = list(dict.fromkeys(args.backends))
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.measure_peak_of:
        name, backend, chunk_size = args.measure_peak_of
        print(measure_peak(Contender(name, backend), args, int(chunk_size)))
        return
    names = [n for n in args.contenders if args.only is None or (args.only == "peer") == (n == "peer")]
    missing = "peer" in names and importlib.util.find_spec(PEER) is None
    if missing:
        names.remove("peer")
        print("peer is missing: titans-pytorch is not installed (pip install titans-pytorch); nothing to compare with")
    machine = f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    print(f"B={args.batch} T={args.length} H={args.heads} D={args.head_dim} expansion={args.expansion} "
          f"shard={args.shard_length} projection={args.qk_projection} float32 on {args.device}; {machine}")  # fmt: skip
    if "auto" in args.backends:
        print(f"auto: {choose_backend(args.device).name}. {choose_backend(args.device).reason}")
    threads = args.threads if args.device == "cpu" else 1
    print(describe_others(look_around(), threads), flush=True)
    others = OtherProcesses()
    rate = matmul_rate(args.device)
    contenders = [Contender(n, b) for n in names for b in ([None] if n == "peer" else args.backends)]
    rows = [row for chunk_size in args.chunk_sizes for row in run_chunk_size(args, contenders, chunk_size, argv)]
    rate = max(rate, matmul_rate(args.device))
    print(f"float32 matmul: {rate / 1e9:.1f} GFLOP/s, the best square torch.mm before and after")
    report(rows, rate)
    seen = [row["cpus_used_by_others"] for row in rows if row["cpus_used_by_others"] is not None]
    print(describe_others(others.cpus(), threads, max(seen, default=None)))
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "measure_peak_of")}
        numbers = {"settings": settings, "machine": machine, "peer_missing": missing, "matmul_rate": rate, "rows": rows}
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
