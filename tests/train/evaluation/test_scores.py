"""Losses, their sums over rows and standard errors, against formulas written out by hand; and the sample."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import Dataset
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train.evaluation import scores as scores_module
from modeling_tnt.train.evaluation.estimates import Estimate, Proportion, fit_slope, mean_error, ratio, ratio_influence
from modeling_tnt.train.evaluation.sample import generate_sample
from modeling_tnt.train.evaluation.scores import Scores, iterate_losses, score_rows

SEQ_LEN = 24


class StubRows(Dataset):
    """Random tokens; with `starts`, each row holds sequences that begin at these columns."""

    def __init__(self, count: int = 5, starts: list[list[int]] | None = None):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 60, (count, SEQ_LEN), generator=generator)
        self.sizes = torch.randint(0, 4, (count, SEQ_LEN), generator=generator).float()
        self.starts = starts

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = {"input_ids": self.ids[i], "labels": self.ids[i].clone()}
        if self.starts is not None:
            row["seq_idx"] = torch.zeros(SEQ_LEN, dtype=torch.int64)
            for start in self.starts[i]:
                row["seq_idx"][start:] += 1
                row["labels"][start] = -100
        return row

    def token_bytes(self, i: int) -> torch.Tensor:
        return self.sizes[i]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tnt() -> TNTForCausalLM:
    torch.manual_seed(0)
    config = TNTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_heads=2, head_dim=16, intermediate_size=64,
        global_chunk_size=16, local_chunk_sizes=[4], local_shard_lengths=8, initializer_range=0.3,
    )  # fmt: skip
    return TNTForCausalLM(config)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_scores_against_the_logits(llama, monkeypatch, batch_size):
    rows, seen = StubRows(), []
    log_p = llama.eval()(rows.ids).logits.log_softmax(-1)[:, :-1].gather(-1, rows.ids[:, 1:, None])[..., 0]
    # A few columns at a time, so that the cross-entropy is put together from several parts.
    monkeypatch.setattr(scores_module, "LOGITS_AT_A_TIME", 384 * 7)
    got = score_rows(llama, rows, batch_size=batch_size, on_batch=seen.append)
    # The order of float32 sums of some hundred terms is all that differs.
    torch.testing.assert_close(got.nats, -log_p.double().sum(1), rtol=1e-5, atol=0)
    assert got.labels.tolist() == [SEQ_LEN - 1] * 5
    assert got.bytes.tolist() == rows.sizes[:, 1:].sum(1).tolist()
    assert sum(seen) == 5
    loss = F.cross_entropy(llama(rows.ids).logits[:, :-1].flatten(0, 1), rows.ids[:, 1:].flatten()).item()
    assert got.perplexity.value == pytest.approx(math.exp(loss), rel=1e-5)
    bits = -log_p.sum().item() / math.log(2) / rows.sizes[:, 1:].sum().item()
    assert got.bits_per_byte.value == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("name", ["tnt", "llama"])
def test_marked_documents_are_scored_as_if_alone(name, request):
    model, starts = request.getfixturevalue(name), [[9], [5, 6], []]
    rows = StubRows(3, starts)
    losses = next(iterate_losses(model, rows, batch_size=3))
    for i, begins in enumerate(starts):
        edges = [0, *begins, SEQ_LEN]
        for begin, end in zip(edges, edges[1:], strict=False):
            alone = model.eval()(rows.ids[None, i, begin:end], use_cache=False).logits[0].log_softmax(-1)
            want = -alone[:-1].gather(-1, rows.ids[i, begin + 1 : end, None])[:, 0]
            # Packed and alone differ by the order of float32 operations.
            torch.testing.assert_close(losses.nats[i, begin : end - 1], want, rtol=1e-4, atol=1e-4)
            assert losses.context[i, begin : end - 1].tolist() == list(range(1, end - begin))
    assert losses.scored.sum(1).tolist() == [SEQ_LEN - 1 - len(begins) for begins in starts]
    assert losses.nats[~losses.scored].eq(0).all()
    scores = score_rows(model, rows, batch_size=2)
    torch.testing.assert_close(scores.nats, losses.nats.double().sum(1), rtol=1e-5, atol=0)
    assert scores.bytes.tolist() == (rows.sizes[:, 1:] * losses.scored).sum(1).tolist()


def test_boundaries_that_a_model_cannot_take_are_an_error(llama):
    class NoPositions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama

        def forward(self, input_ids, use_cache):
            return self.inner(input_ids, use_cache=use_cache)

    assert len(score_rows(NoPositions(), StubRows(2), batch_size=2).nats) == 2
    with pytest.raises(ValueError, match="NoPositions takes neither seq_idx nor position_ids"):
        score_rows(NoPositions(), StubRows(2, [[3], [4]]), batch_size=2)
    with pytest.raises(ValueError, match="no rows to score"):
        score_rows(llama, StubRows(0), batch_size=2)


@pytest.mark.parametrize(
    "wrap",
    [pytest.param(partial(torch.compile, backend="eager"), marks=pytest.mark.slow), torch.nn.DataParallel],
    ids=["compile", "parallel"],
)
def test_a_wrapped_model_is_asked_what_it_takes_behind_its_wrapper(tnt, wrap):
    rows = StubRows(2, [[3], [4]])
    want = score_rows(tnt, rows, batch_size=2)
    torch.testing.assert_close(score_rows(wrap(tnt), rows, batch_size=2).nats, want.nats)


def test_a_model_prepared_by_accelerate(tnt):
    rows = StubRows(2, [[3], [4]])
    want = score_rows(tnt, rows, batch_size=2, autocast=torch.bfloat16)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(copy.deepcopy(tnt))
        torch.testing.assert_close(score_rows(prepared, rows, batch_size=2).nats, want.nats)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # or else another precision would be refused


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_even_after_an_error(llama, training):
    llama.train(training)
    score_rows(llama, StubRows(), batch_size=2)
    assert llama.training == training
    rows = StubRows()
    rows.ids[3, 3] = 1000  # no such token
    with pytest.raises(IndexError):
        score_rows(llama, rows, batch_size=2)
    assert llama.training == training
    llama.eval()


def test_autocast_and_device_are_what_the_caller_says(llama):
    seen = []
    hook = llama.lm_head.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    wide = score_rows(llama, StubRows(), batch_size=5, device="cpu")
    narrow = score_rows(llama, StubRows(), batch_size=5, autocast=torch.bfloat16)
    hook.remove()
    assert seen == [torch.float32, torch.bfloat16]
    # bf16 keeps 8 bits of each of 23 terms: the sums agree within a percent.
    torch.testing.assert_close(wide.nats, narrow.nats, rtol=0.01, atol=0)


# ---------------------------------------------------------------------------------------------------- standard errors


def test_ratio_error_by_hand():
    # r = 6 / 3 = 2; x − r y = 1, −1, 0; SE = sqrt(3/2 · 2) / 3.
    got = ratio(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert got == pytest.approx((2.0, math.sqrt(3) / 3))
    # Unequal: r = 8 / 4 = 2; x − r y = 1, −1; SE = sqrt(2/1 · 2) / 4.
    assert ratio(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 3.0])) == pytest.approx((2.0, 0.5))
    with pytest.raises(ValueError, match="nothing to divide by"):
        ratio(torch.ones(2), torch.zeros(2))
    assert math.isnan(ratio(torch.ones(1), torch.ones(1)).standard_error)


def test_errors_of_the_scores_against_the_bootstrap():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(50, 150, (200,), generator=generator)
    sizes = labels * (3 + torch.rand(200, generator=generator, dtype=torch.float64))
    nats = 0.9 * sizes + 20 * torch.randn(200, generator=generator, dtype=torch.float64)
    scores = Scores(nats, sizes, labels)
    draws = torch.randint(0, 200, (4000, 200), generator=generator)
    again = {
        "nats_per_token": nats[draws].sum(1) / labels[draws].sum(1),
        "perplexity": (nats[draws].sum(1) / labels[draws].sum(1)).exp(),
        "bits_per_byte": nats[draws].sum(1) / sizes[draws].sum(1) / math.log(2),
    }
    for name, values in again.items():
        # The bootstrap's own error is 1/sqrt(2 · 4000) = 1.1%, the delta method's bias of the order 1/200.
        assert getattr(scores, name).standard_error == pytest.approx(values.std().item(), rel=0.05), name
    report = scores.to_json()
    assert report["bits_per_byte"]["value"] == scores.bits_per_byte.value and report["tokens"] == labels.sum()


def test_influences_of_a_difference_of_paired_ratios():
    generator = torch.Generator().manual_seed(2)
    hard, y = torch.randn(50, generator=generator), torch.full((50,), 10.0)
    first, second = hard + 0.01 * torch.randn(50, generator=generator), hard
    (a, influence_a), (b, influence_b) = ratio_influence(first, y), ratio_influence(second, y)
    paired = mean_error(influence_a - influence_b)
    assert a - b == pytest.approx((first - second).mean().item() / 10, rel=1e-4)
    assert paired == pytest.approx(((first - second).double().std() / math.sqrt(50) / 10).item(), rel=1e-6)
    assert paired < 0.1 * ratio(first, y).standard_error


def test_wilson_interval_by_hand():
    # n = 10, p = 0.3, z = 1: centre (0.3 + 0.05) / 1.1, half-width sqrt(0.021 + 0.0025) / 1.1.
    low, high = Proportion(3, 10).interval()
    assert (low, high) == pytest.approx(((0.35 - math.sqrt(0.0235)) / 1.1, (0.35 + math.sqrt(0.0235)) / 1.1))
    assert Proportion(3, 10).standard_error == pytest.approx(math.sqrt(0.0235) / 1.1)
    assert Proportion(0, 10).interval() == pytest.approx((0, 1 / 11))
    assert Proportion(10, 10).interval() == pytest.approx((10 / 11, 1))


def test_slope_weights_and_words():
    x = torch.tensor([1.0, 2.0, 4.0])
    assert (fit_slope(x) * (3 - 0.5 * x)).sum().item() == pytest.approx(-0.5)
    assert str(Estimate(1.23456, 0.0123)) == "1.235 ± 0.012"
    assert str(Estimate(123.4, 21.0)) == "123 ± 21" and str(Estimate(1.5, math.nan)) == "1.5"
    assert Estimate(1.0, math.nan).to_json() == {"value": 1.0, "standard_error": None}
    assert Estimate(2.0, 0.1).exp() == pytest.approx((math.exp(2), 0.1 * math.exp(2)))
    assert Estimate(1e4, 0.1).exp().value == math.inf


def test_the_sample_is_a_function_of_the_seed_and_leaves_the_random_numbers(llama):
    tokenizer = ByT5Tokenizer()
    prompt = torch.tensor(tokenizer("def f(", add_special_tokens=False).input_ids)
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    llama.train()
    first, again, other = (generate_sample(llama, tokenizer, prompt, new_tokens=30, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] == "def f(" and first[1]
    assert torch.rand(1) == want and llama.training
