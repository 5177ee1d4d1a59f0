"""A whole model on the native backend: the torch backend's logits, gradients and texts."""

import pytest
import torch
from model_cases import VARIANTS, make_model, make_tokens

pytestmark = pytest.mark.native

BACKEND = "native"
NATIVE_VARIANTS = [name for name in VARIANTS if name not in ("swiglu-forget", "mlp-muon")]

every_variant = pytest.mark.parametrize("variant", NATIVE_VARIANTS)


def step(variant: str, dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
    """Logits, loss and every gradient of a training step, with padding."""
    model, ids = make_model(variant, dtype, kernel_backend=backend).train(), make_tokens(2, 29)
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": out.logits[mask == 1].detach(), "loss": out.loss.detach()} | gradients


@every_variant
def test_a_training_step(variant: str):
    """Against the torch backend in float64. A result may be off by 2e-5 of its tensor's largest entry, some hundred
    roundings, or by 8 times what the torch backend in float32 is off, where the model amplifies rounding."""
    want, single = (step(variant, dtype, "torch") for dtype in (torch.float64, torch.float32))
    got = step(variant, torch.float32, BACKEND)
    for name, expected in want.items():
        assert (got[name] is None) == (expected is None), name
        if expected is not None:
            error, rounding = ((t[name] - expected).abs().max().item() for t in (got, single))
            allowed = max(2e-5 * max(0.1, expected.abs().max().item()), 8 * rounding)
            assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


@every_variant
@torch.no_grad()
def test_generation(variant: str):
    """A prompt of several chunks, one that is padded, and tokens over the borders of chunks and shards."""
    ids = make_tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    texts, logits = [], []
    for backend in ("torch", BACKEND):
        model = make_model(variant, torch.float32, kernel_backend=backend)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=15, do_sample=False, output_scores=True, pad_token_id=0,
            return_dict_in_generate=True,
        )  # fmt: skip
        texts.append(out.sequences)
        logits.append(torch.stack(out.scores))
    assert torch.equal(*texts)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("has_tail", [True, False])
def test_projections_of_rows_that_were_cut(length: int, has_tail: bool):
    """Rows longer and shorter than the convolution reaches. Single sums of four products: 1e-5 is some roundings."""
    results = []
    for backend in ("torch", BACKEND):
        layer = make_model("mlp", torch.float32, kernel_backend=backend).model.layers[0].memory
        torch.manual_seed(0)
        x = torch.randn(2, length, layer.config.hidden_size, requires_grad=True)
        channels = layer.conv.weight.shape[0]
        tail = torch.randn(2, layer.conv.weight.shape[1] - 1, channels, requires_grad=True) if has_tail else None
        outputs = layer.project(x, None, tail, return_tail=True)
        sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
        results.append([*outputs, x.grad, layer.conv.weight.grad, *([tail.grad] if has_tail else [])])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
