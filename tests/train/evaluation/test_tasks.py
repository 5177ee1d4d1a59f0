"""The measurements of `tnt eval` against sums written out by hand, rigged models and the bootstrap."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import ByT5Tokenizer

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train.evaluation import retrieval as retrieval_module
from modeling_tnt.train.evaluation.chunks import (
    ChunksTask,
    default_chunk_sizes,
    local_chunks,
    measure_chunks,
    scale_chunks,
)
from modeling_tnt.train.evaluation.estimates import Proportion, mean_error
from modeling_tnt.train.evaluation.needles import Needle, NeedleFactory, digits_for
from modeling_tnt.train.evaluation.perplexity import PerplexityTask, compare_scores
from modeling_tnt.train.evaluation.position import (
    PositionTask,
    bin_positions,
    compare_positions,
    join_positions,
    position_edges,
)
from modeling_tnt.train.evaluation.retrieval import RetrievalTask, measure_retrieval, read_to_the_end
from modeling_tnt.train.evaluation.scores import Scores, TokenLosses, iterate_losses, score_rows

SEQ_LEN = 48


class StubRows(Dataset):
    def __init__(self, count: int = 4, seed: int = 0):
        self.ids = torch.randint(3, 60, (count, SEQ_LEN), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}

    def token_bytes(self, i: int) -> torch.Tensor:
        return torch.ones(SEQ_LEN)


def make_tnt(seed: int = 0, **fields) -> TNTForCausalLM:
    torch.manual_seed(seed)
    small = {
        "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16,
        "intermediate_size": 64, "global_chunk_size": 16, "local_chunk_sizes": [4], "local_shard_lengths": 16,
        "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return TNTForCausalLM(TNTConfig(**{**small, **fields}))


@pytest.fixture(scope="module")
def tnt() -> TNTForCausalLM:
    return make_tnt()


def is_png(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


# --------------------------------------------------------------------------------------------------------- perplexity


def test_perplexity_report_and_paired_difference(tnt, tmp_path):
    other = make_tnt(seed=1)
    scores = {name: score_rows(m, StubRows(), batch_size=2) for name, m in (("a", tnt), ("b", other))}
    report = PerplexityTask().report(scores)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["models"]["a"]["perplexity"]["value"] == pytest.approx(
        math.exp(scores["a"].nats.sum().item() / (4 * (SEQ_LEN - 1)))
    )
    # Rows of equal length: the paired error is that of the mean of the rows' differences.
    per_row = (scores["b"].nats - scores["a"].nats) / (SEQ_LEN - 1)
    difference = compare_scores(scores["a"], scores["b"])["nats_per_token"]
    assert difference == pytest.approx((per_row.mean().item(), mean_error(per_row)))
    assert report["minus_first_model"]["b"]["nats_per_token"] == difference.to_json()
    assert compare_scores(scores["a"], scores["a"])["bits_per_byte"] == (0, 0)
    assert "b minus a" in "\n".join(PerplexityTask().describe(scores))
    PerplexityTask().draw(tmp_path / "p.png", scores)
    assert is_png(tmp_path / "p.png")


def test_a_single_row_has_no_error_and_can_be_drawn(tnt, tmp_path):
    scores = {"a": score_rows(tnt, StubRows(1), batch_size=2)}
    report = PerplexityTask().report(scores)
    assert report["models"]["a"]["perplexity"]["standard_error"] is None
    PerplexityTask().draw(tmp_path / "p.png", scores)
    assert is_png(tmp_path / "p.png")


# ----------------------------------------------------------------------------------------------------------- position


@pytest.mark.parametrize("seq_len", [2, 3, 5, 48, 1000, 1024])
def test_position_edges(seq_len):
    edges = position_edges(seq_len)
    assert edges[0] == 1 and edges[-1] == seq_len
    assert all(a < b for a, b in zip(edges, edges[1:], strict=False))
    if seq_len >= 1000:
        assert edges[-3] == seq_len // 2 and edges[-5] == seq_len // 4  # two bins to a doubling


def test_the_curve_averages_back_to_the_loss(tnt):
    rows = StubRows()
    curve = join_positions([bin_positions(x, position_edges(SEQ_LEN)) for x in iterate_losses(tnt, rows, batch_size=3)])
    scores = score_rows(tnt, rows, batch_size=3)
    bins = PositionTask().report({"a": curve})["models"]["a"]["bins"]
    total = sum(b["tokens"] for b in bins)
    assert total == scores.labels.sum()
    weighted = sum(b["tokens"] * b["nats_per_token"]["value"] for b in bins) / total
    assert weighted == pytest.approx(scores.nats_per_token.value, rel=1e-12)
    log_p = (
        tnt.eval()(rows.ids, use_cache=False).logits.log_softmax(-1)[:, :-1].gather(-1, rows.ids[:, 1:, None])[..., 0]
    )
    last = bins[-1]
    want = -log_p[:, last["first_position"] - 1 : last["last_position"]].mean().item()
    assert last["nats_per_token"]["value"] == pytest.approx(want, rel=1e-5)


def made_up_losses(rows: int, slope: float, generator: torch.Generator) -> TokenLosses:
    """Losses 3 + slope · log2(position), with noise for each token and for each row and its second half."""
    context = torch.arange(1, 1024).expand(rows, -1)
    noise = 0.5 * torch.randn(rows, 1023, generator=generator) + 0.3 * torch.randn(rows, 1, generator=generator)
    noise[:, 512:] += 0.2 * torch.randn(rows, 1, generator=generator)
    nats = 3 + slope * context.float().log2() + noise
    return TokenLosses(nats, torch.ones_like(context, dtype=torch.bool), context, torch.ones(rows, 1023))


def test_the_slope_is_found_and_its_error_is_what_the_slope_varies_by():
    generator = torch.Generator().manual_seed(0)
    found = [bin_positions(made_up_losses(40, -0.1, generator), position_edges(1024)).slope() for _ in range(300)]
    slopes = torch.tensor([estimate.value for estimate, *_ in found])
    errors = torch.tensor([estimate.standard_error for estimate, *_ in found])
    assert found[0][1:] == (256, 1023)
    # The mean of 300; bins are wide, so that the centre of one is not where its mean loss is reached (1% here).
    assert slopes.mean().item() == pytest.approx(-0.1, abs=4 * slopes.std().item() / math.sqrt(300) + 0.002)
    # A standard deviation of 300 numbers is known to 4%; the row's step at 512 makes bins of a row correlated.
    assert errors.mean().item() == pytest.approx(slopes.std().item(), rel=0.15)


def test_positions_of_marked_documents_count_from_their_starts():
    context = torch.tensor([[1, 2, 0, 1, 2, 3]])
    nats = torch.tensor([[1.0, 2.0, 0.0, 4.0, 8.0, 16.0]])
    losses = TokenLosses(nats, context > 0, context, torch.ones(1, 6))
    curve = bin_positions(losses, position_edges(7))
    by_first = {
        curve.edges[k]: (curve.nats[0, k].item(), curve.labels[0, k].item()) for k in range(len(curve.edges) - 1)
    }
    assert by_first[1] == (5.0, 2) and by_first[2] == (10.0, 2)
    assert sum(n for n, _ in by_first.values()) == 31 and sum(count for _, count in by_first.values()) == 5


def test_position_report_of_two_models(tmp_path):
    generator = torch.Generator().manual_seed(1)
    flat, falling = (bin_positions(made_up_losses(60, s, generator), position_edges(1024)) for s in (0.0, -0.2))
    curves = {"flat": flat, "falling": falling}
    report = PositionTask().report(curves)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    last = max(compare_positions(flat, falling).items())[1]
    assert last.value == pytest.approx(-0.2 * math.log2(1023 / math.sqrt(2) ** 0.5), abs=5 * last.standard_error)
    words = "\n".join(PositionTask().describe(curves))
    assert "falling: -0." in words and "more context helps" in words
    PositionTask().draw(tmp_path / "p.png", curves)
    assert is_png(tmp_path / "p.png")
    short = bin_positions(TokenLosses(*(torch.ones(2, 2).to(d) for d in (float, bool, int, float))), position_edges(3))
    assert short.slope() is None and "too short" in PositionTask().describe({"a": short})[0]
    PositionTask().draw(tmp_path / "short.png", {"a": short})


# ------------------------------------------------------------------------------------------------------------- chunks


def test_all_local_memories_are_scaled_alike():
    config = TNTConfig(local_chunk_sizes=[4, 16], local_shard_lengths=[64, 256])
    assert [scale_chunks(config, n) for n in (1, 2, 4, 16, 64)] == [[1, 4], [2, 8], [4, 16], [16, 64], [64, 256]]
    never = TNTConfig(local_chunk_sizes=[4, 6], local_shard_lengths=None)
    assert scale_chunks(never, 1) == [1, 2]  # 1.5, rounded
    assert scale_chunks(TNTConfig(local_chunk_sizes=[8, 12], local_shard_lengths=[64, 24]), 64) == [64, 24]
    context = TNTConfig.from_preset("tiny-mac", local_shard_lengths=96, local_chunk_sizes=[16])
    assert [scale_chunks(context, n) for n in (1, 8, 32)] == [[1], [8], [32]]  # of 96 and of segments of 64 tokens
    assert default_chunk_sizes(context, 512) == [1, 2, 4, 8, 16, 32]
    with pytest.raises(ValueError, match="48 must divide 32.*use 32"):
        scale_chunks(context, 48)
    with pytest.raises(ValueError, match="3 must divide 64.*use 2 or 4"):
        scale_chunks(config, 3)
    with pytest.raises(ValueError, match="128 must divide 64.*use 64"):
        scale_chunks(config, 128)


def test_default_chunk_sizes():
    assert default_chunk_sizes(TNTConfig(local_chunk_sizes=[8], local_shard_lengths=64), 1024) == [
        1,
        2,
        4,
        8,
        16,
        32,
        64,
    ]
    assert default_chunk_sizes(TNTConfig(local_chunk_sizes=[6], local_shard_lengths=48), 20) == [1, 2, 4, 6, 8, 16]
    assert default_chunk_sizes(TNTConfig(local_chunk_sizes=[8], local_shard_lengths=None), 16) == [1, 2, 4, 8, 16]


def test_the_curve_at_the_own_chunk_is_the_perplexity_and_the_chunks_are_restored(tnt, tmp_path):
    rows = StubRows()

    def score(model: TNTForCausalLM) -> Scores:
        return score_rows(model, rows, batch_size=2)

    curve = measure_chunks(tnt, [1, 2, 16], score)
    assert list(curve.scores) == [1, 2, 4, 16] and curve.own == 4
    assert curve.scores[4].nats.equal(score(tnt).nats)
    assert tnt.config.local_chunk_sizes == [4]
    # Another chunk size is another model of the text, and the one that from_pretrained would make.
    smaller = make_tnt(local_chunk_sizes=[1])
    smaller.load_state_dict(tnt.state_dict())
    torch.testing.assert_close(curve.scores[1].nats, score(smaller).nats, rtol=1e-6, atol=0)
    assert not torch.allclose(curve.scores[1].nats, curve.scores[4].nats, rtol=1e-4)

    curves = {"stage1": curve, "stage2": measure_chunks(smaller, [1, 2, 4], score)}
    report = ChunksTask().report(curves)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["models"]["stage1"]["curve"][2]["minus_own_chunk_size"]["nats_per_token"]["value"] == 0
    assert [d["chunk_size"] for d in report["minus_first_model"]["stage2"]] == [1, 2, 4]
    # The two models have the same weights: read at equal chunks, they are the same model.
    same = report["models"]["stage2"]["curve"][2]["minus_first_model_as_configured"]["nats_per_token"]
    assert same["value"] == pytest.approx(0, abs=1e-6)
    assert "own" in "\n".join(ChunksTask().describe(curves))
    ChunksTask().draw(tmp_path / "c.png", curves)
    assert is_png(tmp_path / "c.png")


def test_the_chunks_are_restored_after_an_error(tnt):
    with pytest.raises(RuntimeError, match="in the middle"), local_chunks(tnt, [2]):
        assert tnt.config.local_chunk_sizes == [2]
        raise RuntimeError("in the middle")
    assert tnt.config.local_chunk_sizes == [4]


# ---------------------------------------------------------------------------------------------------------- retrieval


class Reader(nn.Module):
    """Reads the text as a person would; `answer` chooses from the pairs {key: value} and the key that is asked for."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.zeros(1))
        self.tokenizer = ByT5Tokenizer()

    def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int = 0) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, 384)
        for row, ids in enumerate(input_ids):
            *lines, question = self.tokenizer.decode(ids, skip_special_tokens=True).split("\n")
            pairs = dict(line.split(" = ") for line in lines if len(line.split(" = ")) == 2)
            reply = self.tokenizer(
                f" {self.answer(pairs, question.split(' =')[0])}", add_special_tokens=False
            ).input_ids
            for i, token in enumerate(reply):
                logits[row, -logits_to_keep + i, token] = 30.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_a_model_that_looks_the_value_up_is_always_right():
    needles = NeedleFactory(ByT5Tokenizer(), seed=0).make(200, 20)
    result = measure_retrieval(Reader(lambda pairs, key: pairs[key]), needles, batch_size=8)
    assert result.accuracy == Proportion(20, 20)
    assert result.nats.max() < 1e-6
    assert all(p.value == 1 for p in result.by_depth())


def test_a_model_that_answers_at_random_is_at_chance():
    draw = random.Random(0)
    needles = NeedleFactory(ByT5Tokenizer(), seed=0).make(100, 400)
    result = measure_retrieval(Reader(lambda pairs, key: draw.choice(list(pairs.values()))), needles, batch_size=100)
    assert result.chance == 1 / 7  # (100 − 6) // 12 pairs
    low, high = result.accuracy.interval(z=4)
    assert low < result.chance < high and high < 0.3


def test_one_wrong_digit_is_a_wrong_answer():
    needles = NeedleFactory(ByT5Tokenizer(), seed=0).make(100, 10)
    for place in range(4):

        def misread(pairs, key, place=place):
            value = pairs[key]
            return value[:place] + str((int(value[place]) + 1) % 10) + value[place + 1 :]

        assert measure_retrieval(Reader(misread), needles, batch_size=10).accuracy.successes == 0


def test_documents_are_exact_and_deterministic():
    tokenizer = ByT5Tokenizer()
    factory, again, other = (NeedleFactory(tokenizer, seed=s) for s in (3, 3, 4))
    first, second, third = (f.make(300, 10) for f in (factory, again, other))
    assert all(a.context.equal(b.context) and a.answer.equal(b.answer) for a, b in zip(first, second, strict=True))
    assert not first[0].context.equal(third[0].context)
    for i, needle in enumerate(first):
        text, answer = tokenizer.decode(needle.context), tokenizer.decode(needle.answer)
        *lines, question = text.split("\n")
        pairs = [line.split(" = ") for line in lines if line.count(" = ") == 1 and len(line) == 11]
        assert len(needle.context) == 300 and needle.pairs == 24 <= len(pairs) <= 25
        assert len({k for k, _ in pairs}) == len({v for _, v in pairs}) == len(pairs)
        assert f"{question}{answer}" in lines
        # Depths run evenly from the start to the end; a pair is 12 of 300 tokens long.
        assert text.index(f"{question}{answer}") / 300 == needle.depth == pytest.approx((i + 0.5) / 10, abs=0.06)
    with pytest.raises(ValueError, match="20 tokens have no room for 2 pairs.*at least 31"):
        factory.make(20, 1)
    factory.make(31, 1)
    assert digits_for(7) == digits_for(999) == 4 and digits_for(12000) == 6


class Words:
    """A tokenizer of words of any length that begins texts with a token of its own and joins " =" to what follows."""

    def __init__(self):
        self.known: dict[str, int] = {"<s>": 0}

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> SimpleNamespace:
        pieces = text.replace(" = ", " \x00= ").replace(" =", " =").replace("\n", " \n ").split(" ")
        pieces = [p for word in pieces if word for p in ([word[:3], word[3:]] if word[0] in "aeiou" else [word]) if p]
        return SimpleNamespace(
            input_ids=[0] * add_special_tokens + [self.known.setdefault(p, len(self.known)) for p in pieces]
        )

    def words(self, ids: torch.Tensor) -> list[str]:
        names = list(self.known)
        return [names[i] for i in ids.tolist()]


def test_documents_through_a_tokenizer_with_its_own_start_and_lengths():
    tokenizer = Words()
    needles = NeedleFactory(tokenizer, seed=0).make(100, 12)
    for needle in needles:
        words = tokenizer.words(needle.context)
        assert len(words) == 100 and words[0] == "<s>" and words.count("<s>") == 1
        # " =" with a value behind it is another token, so that the answer begins with it.
        answer = tokenizer.words(needle.answer)
        assert answer[0] == "\x00=" and len(answer) == 2 and answer[1].isdigit()
        assert answer[1] in words[1:-1] and 0 <= needle.depth < 1
    assert min(n.depth for n in needles) < 0.15 and max(n.depth for n in needles) > 0.85


def test_a_tnt_model_reads_in_pieces_what_it_would_read_at_once(tnt, monkeypatch):
    ids = torch.randint(3, 200, (2, 70), generator=torch.Generator().manual_seed(0))
    want = tnt.eval()(ids, use_cache=False).logits[:, -5:]
    seen = []
    hook = tnt.model.register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    monkeypatch.setattr(retrieval_module, "PIECE", 16)
    with torch.no_grad():
        got = read_to_the_end(tnt, ids, 5)
    hook.remove()
    assert seen == [16, 16, 16, 16, 1, 5]
    # The order of float32 operations differs where a chunk is cut.
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_teacher_forcing_agrees_with_greedy_decoding(tnt):
    """Answers that the model itself would give are right; the same with another last token are wrong."""
    contexts = torch.randint(3, 200, (6, 40), generator=torch.Generator().manual_seed(0))
    given = tnt.eval().generate(
        contexts, attention_mask=torch.ones_like(contexts), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )[:, 40:]
    lengths = [1, 2, 3, 4, 4, 4]  # answers of unequal length in one batch
    needles = [Needle(c, a[:n], 0.5, 3) for c, a, n in zip(contexts, given, lengths, strict=True)]
    assert 1 not in given  # min_new_tokens keeps generate() from its end-of-sequence token
    assert measure_retrieval(tnt, needles, batch_size=6).exact.all()
    wrong = [n._replace(answer=torch.cat([n.answer[:-1], n.answer[-1:] + 1])) for n in needles]
    assert not measure_retrieval(tnt, wrong, batch_size=4).exact.any()


def test_retrieval_report(tmp_path):
    factory, draw = NeedleFactory(ByT5Tokenizer(), seed=0), random.Random(0)
    models = {
        "right": Reader(lambda pairs, key: pairs[key]),
        "late": Reader(lambda pairs, key: pairs[key] if draw.random() < 0.5 else "0"),
    }
    results = {
        name: [measure_retrieval(m, factory.make(n, 10), batch_size=10) for n in (64, 128)]
        for name, m in models.items()
    }
    report = RetrievalTask().report(results)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    entry = report["models"]["right"][1]
    assert entry["length"] == 128 and entry["exact_match"]["value"] == 1 and entry["exact_match"]["low"] < 1
    assert len(entry["by_depth"]) == 5 and entry["chance"] == 1 / entry["pairs"]
    assert "128 tokens  100.0%" in "\n".join(RetrievalTask().describe(results))
    RetrievalTask().draw(tmp_path / "r.png", results)
    assert is_png(tmp_path / "r.png")
