"""A whole model on kernels, Triton's here in their interpreter: the torch backend's results, and in one graph."""

import pytest
import torch

from modeling_tnt import TNTConfig, TNTForCausalLM, memory_layer
from modeling_tnt.kernels import backends, choose_backend, native_backend, probe

pytest.importorskip("triton")
KERNELS = pytest.mark.parametrize("backend", ["triton", pytest.param("native", marks=pytest.mark.native)])


@pytest.fixture
def model() -> TNTForCausalLM:
    torch.manual_seed(0)
    config = TNTConfig.from_preset(
        "tiny", num_hidden_layers=1, hidden_size=32, num_heads=1, head_dim=16, intermediate_size=32, vocab_size=64,
        memory_expansion=1, global_chunk_size=8, local_chunk_sizes=[4], local_shard_lengths=8, qk_projection="shard",
    )  # fmt: skip
    return TNTForCausalLM(config)


def loss_and_gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "checkpointing"]
)
@KERNELS
def test_training_step_equals_the_torch_backend(model: TNTForCausalLM, backend: str, checkpointing: bool):
    ids = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(1))
    model.config.kernel_backend = "torch"
    want = loss_and_gradients(model, ids)
    model.config.kernel_backend = backend
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    got = loss_and_gradients(model, ids)
    assert got.keys() == want.keys()
    for name, expected in want.items():  # float32 on both sides, sums of some hundred terms
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.native
def test_hooks_see_and_may_change_what_a_convolution_gives(model: TNTForCausalLM):
    """Where nothing is cached, too: twice as strong by a hook is one with twice the weights."""
    ids, seen = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(1)), []
    model.config.kernel_backend = "native"
    conv = model.model.layers[0].memory.conv
    with torch.no_grad():
        handle = conv.register_forward_hook(lambda module, args, out: seen.append(out[0]) or (2 * out[0], out[1]))
        got = model(ids, use_cache=False).logits
        handle.remove()
        conv.weight.mul_(2)
        torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    assert [y.shape for y in seen] == [(2, 13, 48)]


@pytest.mark.slow
@KERNELS
def test_a_training_step_is_one_graph(model: TNTForCausalLM, backend: str):
    """The kernels are operators that torch.compile sees: no graph break, with `fullgraph=True` that would raise."""
    torch._dynamo.reset()  # an earlier test's other lengths would make this one's symbolic
    ids = torch.randint(0, 64, (1, 13), generator=torch.Generator().manual_seed(1))
    model.config.kernel_backend = backend
    eager = loss_and_gradients(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), eager["loss"], rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in eager:
            torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-4, atol=1e-5)


@pytest.mark.native
@torch.no_grad()
def test_hooks_see_and_may_change_what_the_output_norm_gives_a_token(model: TNTForCausalLM):
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    model.config.kernel_backend = "native"
    norm, seen = model.model.layers[0].memory.norm, []

    def decoded() -> torch.Tensor:
        cache = model(ids[:, :4], use_cache=True).cache
        return torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in range(4, 9)], 1)

    handle = norm.register_forward_hook(lambda module, args, out: seen.append(out) or 2 * out)
    got = decoded()
    handle.remove()
    norm.weight.mul_(2)
    assert len(seen) == 6
    torch.testing.assert_close(got, decoded(), rtol=1e-4, atol=1e-5)


@pytest.mark.native
@torch.no_grad()
def test_a_cpu_reads_and_decodes_by_the_native_kernels(model: TNTForCausalLM, monkeypatch):
    """Without being told to: every memory of a prompt, and one step a layer for each token behind it, the first of
    which makes the buffers for those of whole layers. States in float64 are the torch backend's."""
    calls = []
    for name in ("read", "step", "layer_step"):
        original = getattr(native_backend, name)
        spy = lambda *call, name=name, original=original: calls.append(name) or original(*call)  # noqa: E731
        monkeypatch.setattr(native_backend, name, spy)
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    greedy = {"max_new_tokens": 6, "do_sample": False}
    got = model.generate(ids, **greedy)
    assert calls == ["read"] * 2 + ["step"] + ["layer_step"] * 4
    model.config.kernel_backend = "torch"
    assert torch.equal(got, model.generate(ids, **greedy))
    model.config.kernel_backend = "auto"
    model.double().generate(ids, **greedy)
    assert len(calls) == 7


@pytest.mark.filterwarnings("ignore:backend='auto' runs the torch backend")
@pytest.mark.parametrize(
    "changes, apart", [({}, []), ({"use_momentum": True}, ["local"]), ({"global_update": "muon"}, ["global"])], ids=str
)
def test_auto_keeps_what_torch_reads_out_of_graphs(changes: dict, apart: list[str], monkeypatch):
    """In float32 the state of such a local memory with momentum does not fit on the chip, while a global memory's need
    not, and a step's neither. No kernel learns by Muon. Here the CPU counts as a GPU."""
    for module in (memory_layer, backends):
        monkeypatch.setattr(module, "choose_backend", lambda device_type, *call: choose_backend("cuda", *call))
    read, reads = memory_layer._read_apart_from_graphs, []
    monkeypatch.setattr(memory_layer, "_read_apart_from_graphs", lambda *a, **k: reads.append(a) or read(*a, **k))
    monkeypatch.setattr(probe, "failure", lambda configuration: None)
    config = TNTConfig.from_preset(
        "tiny", num_hidden_layers=1, hidden_size=32, num_heads=1, head_dim=64, intermediate_size=32, vocab_size=64,
        memory_expansion=2, global_chunk_size=8, local_chunk_sizes=[4], local_shard_lengths=8, kernel_backend="auto",
        **changes,
    )  # fmt: skip
    model = TNTForCausalLM(config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=False)
    assert ["global" if problem.options.is_global else "local" for problem, *_ in reads] == apart
