"""Every mistake a caller can make is answered by a message that names the argument, the rule and the value."""

import importlib.util
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from memory_cases import Case, call, make_inputs
from torch._subclasses import FakeTensorMode

from modeling_tnt.kernels import (
    BACKENDS,
    MemoryParams,
    MemoryState,
    backends,
    choose_backend,
    choose_step_backend,
    global_memory,
    local_memory,
    triton_backend,
)
from modeling_tnt.kernels.checks import MemoryProblem
from modeling_tnt.kernels.types import MemoryGates, MemoryOptions

B, T, H, D, M = 2, 5, 2, 4, 6
PARAMS = MemoryParams(torch.ones(H, D, M), torch.ones(H, M), torch.ones(H, M, D), torch.ones(H, D))
LINEAR = MemoryParams(torch.ones(H, D, D))


def good() -> dict[str, object]:
    """Arguments of a call that works."""
    x = torch.ones(B, T, H, D)
    return {
        "q": x, "k": x, "v": x, "lr": x[..., 0], "params": PARAMS, "chunk_size": 2, "shard_length": 4,
        "backend": "reference",
    }  # fmt: skip


def state_of(**changes: object):
    case = Case(batch=B, length=T, heads=H, head_dim=D, hidden=M, dtype=torch.float32, projection="shard")
    case = case.with_(**changes)
    with torch.no_grad():
        return call(case, "reference", make_inputs(case))[1]


X = torch.ones(B, T, H, D)
GATE = torch.ones(B, T, H)
BAD = {
    "q type": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "q dims": ({"q": X[0]}, ValueError, "q must have shape [B, T, H, D], got (5, 2, 4)"),
    "no token": ({"q": X[:, :0]}, ValueError, "got [B, T, H, D] = (2, 0, 2, 4); skip the call when there is no token"),
    "no row": ({"q": X[:0]}, ValueError, "q must not be empty"),
    "q dtype": ({"q": X.long()}, TypeError, "q must be a floating-point tensor, got torch.int64"),
    "k shape": ({"k": X[:, :3]}, ValueError, "k must have shape [B, T, H, D] = (2, 5, 2, 4), got (2, 3, 2, 4)"),
    "v dtype": ({"v": X.double()}, TypeError, "v must have the dtype of q, torch.float32, got torch.float64"),
    "v type": ({"v": None}, TypeError, "v must be a tensor, got NoneType"),
    "k device": ({"k": X.to("meta")}, ValueError, "k is on meta but q is on cpu; move it with .to('cpu')"),
    "lr shape": ({"lr": X}, ValueError, "lr must have shape [B, T, H] = (2, 5, 2), got (2, 5, 2, 4)"),
    "lr dtype": ({"lr": GATE.int()}, TypeError, "lr must be a floating-point tensor, got torch.int32"),
    "momentum": ({"momentum": GATE[0]}, ValueError, "momentum must have shape [B, T, H] = (2, 5, 2), got (5, 2)"),
    "momentum type": ({"momentum": 0.9}, TypeError, "momentum must be a tensor, got float"),
    "decay": ({"decay": GATE[..., 0]}, ValueError, "decay must have shape [B, T, H] = (2, 5, 2), got (2, 5)"),
    "params type": ({"params": tuple(PARAMS)}, TypeError, "params must be a MemoryParams, got tuple"),
    "w1": ({"params": MemoryParams(torch.ones(D, M))}, ValueError, "params.w1 must be a tensor of shape [H, D, M]"),
    "w1 type": ({"params": MemoryParams(None)}, ValueError, "params.w1 must be a tensor of shape [H, D, M]"),
    "w1 heads": (
        {"params": PARAMS._replace(w1=torch.ones(3, D, M))},
        ValueError,
        "params.w1 must have shape [H, D, M] = (2, 4, 6), got (3, 4, 6)",
    ),
    "w2": (
        {"params": PARAMS._replace(w2=torch.ones(H, D, M))},
        ValueError,
        "params.w2 must have shape [H, M, D] = (2, 6, 4), got (2, 4, 6)",
    ),
    "b1": ({"params": PARAMS._replace(b1=torch.ones(H, D))}, ValueError, "params.b1 must have shape [H, M] = (2, 6)"),
    "b2 device": ({"params": PARAMS._replace(b2=torch.ones(H, D, device="meta"))}, ValueError, "params.b2 is on meta"),
    "linear b2": (
        {"params": LINEAR._replace(b2=torch.ones(H, D))},
        ValueError,
        "params.b2 is the bias of w2, which is not given",
    ),
    "linear M": (
        {"params": MemoryParams(torch.ones(H, D, M))},
        ValueError,
        "a linear memory (w2=None) needs params.w1 of shape [H, D, D], got M=6 and D=4",
    ),
    "half a norm": (
        {"params": PARAMS._replace(norm_weight=torch.ones(H, D))},
        ValueError,
        "params.norm_weight and params.norm_bias come together: pass both or neither",
    ),
    "norm shape": (
        {"params": PARAMS._replace(norm_weight=torch.ones(D), norm_bias=torch.ones(D))},
        ValueError,
        "params.norm_weight must have shape [H, D] = (2, 4), got (4,)",
    ),
    "chunk type": ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int, got float"),
    "chunk bool": ({"chunk_size": True}, TypeError, "chunk_size must be an int, got bool"),
    "chunk zero": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    "shard type": ({"shard_length": "4"}, TypeError, "shard_length must be an int, got str"),
    "shard zero": ({"shard_length": 0}, ValueError, "shard_length must be at least 1, got 0"),
    "shard multiple": (
        {"chunk_size": 4, "shard_length": 10},
        ValueError,
        "chunk_size=4 must divide shard_length=10; use shard_length=8 or None",
    ),
    "shard too small": (
        {"chunk_size": 4, "shard_length": 2},
        ValueError,
        "chunk_size=4 must divide shard_length=2; use shard_length=4 or None",
    ),
    "projection": (
        {"qk_projection": "global"},
        ValueError,
        "qk_projection='global' is unknown; use one of ('shard', 'chunk', 'none')",
    ),
    "normalize type": ({"normalize_projection": 1}, TypeError, "normalize_projection must be a bool, got int"),
    "normalize nothing": (
        {"qk_projection": "none", "normalize_projection": True},
        ValueError,
        "normalize_projection=True needs a projection",
    ),
    "token scale shape": (
        {"token_scale": torch.ones(3)},
        ValueError,
        "token_scale must have shape [chunk_size] = (2,), got (3,)",
    ),
    "token scale and gates": (
        {"token_scale": torch.ones(2), "decay": GATE},
        ValueError,
        "token_scale excludes momentum and decay",
    ),
    "cu type": ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens must be a tensor, got list"),
    "cu dtype": (
        {"cu_seqlens": torch.tensor([0.0, 5.0])},
        ValueError,
        "cu_seqlens must be a [N + 1] tensor of int32 or int64, got (2,) torch.float32",
    ),
    "cu shape": ({"cu_seqlens": torch.tensor([0])}, ValueError, "cu_seqlens must be a [N + 1] tensor"),
    "cu rows": (
        {"cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        "cu_seqlens needs all sequences packed into one row (B = 1), got B=2",
    ),
    "state type": ({"initial_state": {}}, TypeError, "initial_state must be a MemoryState, got dict"),
    "state rows": (
        {"initial_state": state_of(batch=3)},
        ValueError,
        "initial_state.weights.w1 must have shape [rows, *params] = (2, 2, 4, 6), got (3, 2, 4, 6)",
    ),
    "state of another memory": (
        {"initial_state": state_of(bias=False)},
        ValueError,
        "initial_state.weights.b1 does not match params.b1: one is None, one is not",
    ),
    "state with momentum": (
        {"initial_state": state_of(rule="momentum")},
        ValueError,
        "initial_state.momentum and momentum must both be given or both be None",
    ),
    "state without momentum": (
        {"initial_state": state_of(), "momentum": GATE},
        ValueError,
        "initial_state.momentum and momentum must both be given or both be None",
    ),
    "state without projection": (
        {"initial_state": state_of(projection="none")},
        ValueError,
        "initial_state.projection does not fit qk_projection='shard'",
    ),
    "state with projection": (
        {"initial_state": state_of(), "qk_projection": "none"},
        ValueError,
        "initial_state.projection does not fit qk_projection='none'",
    ),
    "projection shape": (
        {"initial_state": state_of()._replace(projection=torch.ones(B, H, D, M))},
        ValueError,
        "initial_state.projection must have shape [rows, H, D, D] = (2, 2, 4, 4), got (2, 2, 4, 6)",
    ),
    "position": (
        {"initial_state": state_of()._replace(position=torch.zeros(B))},
        ValueError,
        "initial_state.position must be an int64 tensor of shape [rows] = (2,)",
    ),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend='cuda' is unknown; use one of 'auto', 'reference', 'torch', 'native', 'triton'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_local_memory(name: str):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        local_memory(**good() | changes)


@pytest.mark.parametrize(
    "ends, shown",
    [([0, 4], "[0, 4]"), ([1, 5], "[1, 5]"), ([0, 3, 2, 5], "[0, 3, 2, 5]"), ([0] * 30 + [4], "0, '…']")],
)
def test_packing(ends: list[int], shown: str):
    packed = good() | {name: good()[name][:1] for name in ("q", "k", "v", "lr")}
    message = f"cu_seqlens must rise from 0 to T=5, got {'[0, 0' if len(ends) > 20 else shown}"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        local_memory(**packed, cu_seqlens=torch.tensor(ends))
    assert shown in str(caught.value)


def test_global_memory_is_checked_too():
    arguments = good() | {"lr": X}
    del arguments["shard_length"]
    with pytest.raises(ValueError, match=r"lr must have shape"):
        global_memory(**arguments)
    with pytest.raises(ValueError, match=r"initial_state.projection does not fit qk_projection='none'"):
        global_memory(**arguments | {"lr": GATE, "initial_state": state_of()})


@pytest.mark.parametrize("operation", [local_memory, global_memory])
def test_a_misspelt_argument_is_refused(operation):
    with pytest.raises(TypeError, match="chunk_sizes"):
        operation(X, X, X, GATE, PARAMS, chunk_size=2, chunk_sizes=2)


@pytest.mark.parametrize("operation", [local_memory, global_memory])
def test_tracing_is_refused(operation):
    with pytest.raises(ValueError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda x: operation(x, x, x, GATE, PARAMS, chunk_size=2)[0], (X,))


def test_good_arguments_are_good():
    """Every case above differs from this one by what it names only."""
    o, state = local_memory(**good())
    assert o.shape == X.shape and state is None


def test_an_unknown_update():
    arguments = good() | {"update": "adam"}
    del arguments["shard_length"]
    with pytest.raises(ValueError, match="update='adam' is unknown; use one of"):
        global_memory(**arguments)


def test_auto_says_what_it_picks_and_why():
    choice = choose_backend("cpu")
    assert choice.name in BACKENDS and "cpu" in choice.reason


# What the kernels cannot run ------------------------------------------------------------------------------------------

H200 = ((9, 0), 232448)  # compute capability, bytes of shared memory a block


def problem_of(
    D: int = 64, M: int = 128, chunk_size: int = 16, momentum: bool = False, dtype: torch.dtype = torch.bfloat16,
    update: str = "gradient", **fields: object,
) -> MemoryProblem:  # fmt: skip
    """One token and one head."""
    x, gate = torch.ones(1, 1, 1, D, dtype=dtype), torch.ones(1, 1, 1)
    params = MemoryParams(torch.ones(1, D, M), w2=torch.ones(1, M, D))
    gates = MemoryGates(gate, gate if momentum else None)
    problem = MemoryProblem(x, x, x, gates, params, MemoryOptions(chunk_size, update=update))
    return problem._replace(**fields)


IN_MID_CHUNK = {"initial_state": MemoryState(MemoryParams(None).fast_weights, None, None, None, torch.tensor([3]))}
TOO_MUCH = {
    "capability": ({}, ((7, 5), 65536), "it needs compute capability 8.0 or newer, cpu has 7.5"),
    "dtype": (
        {"dtype": torch.float64},
        H200,
        "q must be of dtype torch.float32, torch.bfloat16, torch.float16, got torch.float64",
    ),
    "head dim": ({"D": 24, "M": 32}, H200, "the head dim must be one of (16, 32, 64, 128), got 24"),
    "width": ({"M": 192}, H200, "the memory's hidden width must be a power of two of at least 16, got 192"),
    "narrow": ({"D": 16, "M": 8}, H200, "the memory's hidden width must be a power of two of at least 16, got 8"),
    "large state": (
        {"D": 128, "M": 512},
        H200,
        "must have at most 65536 numbers a head to stay on the chip with torch.bfloat16, got 131072; use",
    ),
    "float32": (
        {"M": 256, "dtype": torch.float32},
        H200,
        "must have at most 16384 numbers a head to stay on the chip with torch.float32, got 32768; use bfloat16",
    ),
    "gradients in float16": (  # whose operands are float32
        {"M": 256, "dtype": torch.float16, "q": torch.ones(1, 1, 1, 64, dtype=torch.float16, requires_grad=True)},
        H200,
        "must have at most 16384 numbers a head to stay on the chip with torch.float16, got 32768; use bfloat16",
    ),
    "momentum": ({"D": 128, "M": 256, "momentum": True}, H200, "numbers a head to stay on the chip"),
    "update": ({"update": "muon"}, H200, "(global_update of a model) must be 'gradient', got 'muon'; use that"),
    "anchor": ({"M": 256, "momentum": True, "chunk_size": 17}, H200, "a chunk_size up to 16 or no momentum"),
    "mid-chunk": (IN_MID_CHUNK | {"M": 256, "momentum": True}, H200, "got 98304"),
    "shared memory": (
        {"dtype": torch.float32},
        ((8, 6), 65536),
        "bytes of shared memory, the device has 65536; use bfloat16, a smaller memory_expansion",
    ),
}  # fmt: skip


@pytest.fixture
def limits():
    pytest.importorskip("triton")
    from modeling_tnt.kernels.fused import limits

    return limits


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_the_kernels_cannot_run(name: str, limits):
    """Refused to who names triton, and left to torch, with the reason, by "auto"."""
    options, device, message = TOO_MUCH[name]
    problem = problem_of(**options)
    with limits.assume_device(*device):
        with pytest.raises(ValueError, match=r"backend='triton' cannot run: .*; or use backend='torch'") as caught:
            backends.load_backend("triton", problem)
        choice = choose_backend("cuda", problem)
    assert message in str(caught.value)
    assert choice.name == "torch" and message in choice.reason


@pytest.mark.parametrize(
    "options, device",
    [({}, H200), ({}, ((8, 0), 166912)), ({"M": 256}, H200), ({"D": 128}, H200), ({"momentum": True}, H200),
     (IN_MID_CHUNK, H200), ({"dtype": torch.float32}, ((8, 0), 166912))],
    ids=str,
)  # fmt: skip
def test_what_the_kernels_can_run(options: dict, device: tuple, limits):
    """And "auto" then picks them."""
    with limits.assume_device(*device):
        assert choose_backend("cuda", problem_of(**options)).name == "triton"
        assert backends.load_backend("triton", problem_of(**options)).__name__.endswith("triton_backend")


@pytest.mark.slow
def test_a_global_memory_need_not_fit_on_the_chip(limits):
    problem = problem_of(D=128, M=1024, momentum=True)
    with limits.assume_device(*H200):
        assert (
            choose_backend("cuda", problem._replace(options=problem.options._replace(is_global=True))).name == "triton"
        )
        assert choose_backend("cuda", problem).name == "torch"


def test_triton_on_a_cpu(limits, monkeypatch):
    """Named, outside of the interpreter, it is refused."""
    monkeypatch.setattr(limits, "interpreted", lambda: False)
    message = "it needs a CUDA device (or TRITON_INTERPRET=1), the tensors are on cpu; move them to 'cuda'"
    for operation, arguments in ((local_memory, good()), (global_memory, good())):
        if operation is global_memory:
            del arguments["shard_length"]
        with pytest.raises(ValueError, match=re.escape(f"backend='triton' cannot run: {message}")):
            operation(**arguments | {"backend": "triton"})


def test_auto_on_a_cpu_is_never_triton():
    """Also where the interpreter could run the kernels."""
    problem = problem_of(dtype=torch.float32)
    assert choose_backend("cpu", problem).name != "triton"
    assert not backends.load_backend("auto", problem).__name__.endswith("triton_backend")


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    choice = choose_backend("cuda", problem_of())
    assert choice.name == "torch" and "pip install triton" in choice.reason
    with pytest.raises(ValueError, match="backend='triton' cannot run: triton is not installed; install it with pip"):
        local_memory(**good() | {"backend": "triton"})


@pytest.mark.parametrize("version", ["3.4.0", "3.5.1+git1a2b3c"])
def test_a_triton_that_is_too_old(version: str, monkeypatch):
    """Nothing of it is asked but its version: the kernels are not even imported."""
    pytest.importorskip("triton")
    monkeypatch.setattr("triton.__version__", version)
    for name in [name for name in sys.modules if name.startswith(("modeling_tnt.kernels.fused", "triton.language"))]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    message = f"triton {version} is installed, its kernels need 3.6 or newer; upgrade torch"
    choice = choose_backend("cuda", problem_of())
    assert choice.name == "torch" and message in choice.reason
    with pytest.raises(ValueError, match=re.escape(f"backend='triton' cannot run: {message}")):
        local_memory(**good() | {"backend": "triton"})
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_step_backend("triton", MemoryParams(torch.zeros(1, 16, 16)))


@pytest.mark.parametrize("version", [triton_backend.MIN_TRITON, "3.6.0", "3.10.0", "3.7.1+gitabc"])
def test_a_triton_that_is_new_enough(version: str, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("triton.__version__", version)
    assert backends.missing("triton", "cuda") is None


def test_the_oldest_triton_is_that_of_the_requirements():
    setup = (Path(__file__).parents[2] / "setup.cfg").read_text(encoding="utf-8")
    assert re.findall(r"^ *triton>=([\d.]+)", setup, re.MULTILINE) == [triton_backend.MIN_TRITON]


def test_an_amd_gpu_is_cuda_by_name_only(monkeypatch):
    """torch for ROCm calls its devices "cuda", too. Every message says so, and nobody is told to move tensors there."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with FakeTensorMode():
        q, w = torch.empty(1, 1, 1, 64, device="cuda"), torch.empty(1, 64, 64, device="cuda")
        problem = problem_of()._replace(q=q)
        choices = [
            choose_backend("cuda"),
            choose_backend("cuda", problem),
            choose_step_backend("auto", MemoryParams(w)),
        ]
        for choice in choices:
            assert choice.name == "torch" and "NVIDIA GPUs" in choice.reason and "ROCm 6.4" in choice.reason
        with pytest.raises(ValueError, match="built for ROCm 6.4, 'cuda' is an AMD GPU") as read:
            backends.load_backend("triton", problem)
        with pytest.raises(ValueError, match="built for ROCm 6.4, 'cuda' is an AMD GPU") as step:
            choose_step_backend("triton", MemoryParams(w))
    assert not any("move them" in str(caught.value) for caught in (read, step))


def test_auto_warns_once_that_a_gpu_does_without_the_kernels(limits):
    backends.warn_of_fallback.cache_clear()
    with FakeTensorMode(), limits.assume_device(*H200):
        problem = problem_of(D=24, M=32)._replace(q=torch.empty(1, 1, 1, 24, dtype=torch.bfloat16, device="cuda"))
        message = r"backend='auto' runs the torch backend on cuda\. .*got 24"
        with pytest.warns(UserWarning, match=message):
            assert backends.load_backend("auto", problem).__name__.endswith("torch_backend.reader")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backends.load_backend("auto", problem)
            with pytest.raises(UserWarning, match="got 40"):
                wider = problem._replace(params=MemoryParams(torch.empty(1, 16, 40), w2=torch.empty(1, 40, 16)))
                backends.load_backend("auto", wider)
