"""The same tokens give the same logits, states and gradients, however they are cut, padded or packed."""

import pytest
import torch
from model_cases import VARIANTS, assert_same_states, make_model, make_tokens
from transformers import DynamicCache

# Float64: two ways to the same sums differ by rounding, 1e-16 each, which a few hundred inner steps amplify by far less
# than a million; a wrong chunk, shard or row shows at 1e-3 and more.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
# Float32, the same argument from 1e-7 on.
SINGLE = {"rtol": 1e-3, "atol": 2e-4}
T = 19  # two shards and a bit, in mid-chunk of every memory

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def read_in_pieces(model, tokens, cuts, **kwargs):
    """Logits and cache of a read that is cut before the given columns."""
    cache, logits = DynamicCache(config=model.config), []
    for begin, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        out = model(tokens[:, begin:end], cache=cache, **{k: v[:, :end] for k, v in kwargs.items()})
        logits.append(out.logits)
        assert out.cache is cache and cache.get_seq_length() == end
    return torch.cat(logits, dim=1), cache


@every_variant
@pytest.mark.parametrize(
    "cuts", [range(1, T), (4, 8, 16), (3, 5, 9, 18), (1, 17)], ids=["each-token", "boundaries", "mid-chunk", "across"]
)
@torch.no_grad()
def test_a_read_may_be_cut_anywhere(variant, cuts):
    model, tokens = make_model(variant), make_tokens(2, T)
    whole = model(tokens, use_cache=True)
    logits, cache = read_in_pieces(model, tokens, list(cuts))
    torch.testing.assert_close(logits, whole.logits, **EXACT)
    assert_same_states(cache, whole.cache, **EXACT)


@every_variant
@torch.no_grad()
def test_the_reference_backend_agrees(variant):
    tokens = make_tokens(2, T)
    ours = make_model(variant)(tokens, use_cache=True)
    reference = make_model(variant, kernel_backend="reference")(tokens, use_cache=True)
    torch.testing.assert_close(ours.logits, reference.logits, **EXACT)
    assert_same_states(ours.cache, reference.cache, **EXACT)


@every_variant
@torch.no_grad()
def test_what_comes_later_changes_nothing_before(variant):
    """Lengths around chunk and shard boundaries are prefixes; a changed token moves its row from there on."""
    model, tokens = make_model(variant), make_tokens(2, T)
    whole = model(tokens).logits
    for length in (1, 3, 4, 5, 7, 8, 9):
        torch.testing.assert_close(model(tokens[:, :length]).logits, whole[:, :length], **EXACT)
    changed = tokens.clone()
    changed[0, 6] = changed[0, 6] % 39 + 1
    moved = (model(changed).logits - whole).abs().amax(-1)
    assert torch.equal(moved[1], torch.zeros_like(moved[1])), "another row moved"
    # Not exactly zero: the tokens of a chunk share a matrix product, whose rounding depends on all of them.
    assert moved[0, :6].max() < 1e-12, "an earlier token moved"
    assert moved[0, 6] > 1e-3
    assert moved[0, 16:].max() > 1e-6, "nothing was remembered beyond the convolutions of two layers"


def pad(rows: list[torch.Tensor], length: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [rows, length]."""
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


@every_variant
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(variant):
    model = make_model(variant)
    rows = [make_tokens(n, seed=n) for n in (19, 9, 1, 8)]
    alone = [model(row[None], use_cache=True) for row in rows]
    for side in ("left", "right"):
        ids, mask = pad(rows, 21, side)
        out = model(ids, attention_mask=mask, use_cache=True, output_hidden_states=True)
        assert out.hidden_states[1].shape == (4, 21, 32)
        for i, single in enumerate(alone):
            torch.testing.assert_close(out.logits[i][mask[i] == 1], single.logits[0], **EXACT)
            assert_same_states(single.cache, out.cache, slice(i, i + 1), **EXACT)
        assert out.cache.get_seq_length() == 21


@torch.no_grad()
def test_padding_of_a_single_row():
    model, row = make_model(), make_tokens(1, 9)
    alone = model(row, use_cache=True)
    for side in ("left", "right"):
        ids, mask = pad(list(row), 12, side)
        out = model(ids, attention_mask=mask.bool(), use_cache=True)
        torch.testing.assert_close(out.logits[mask == 1], alone.logits[0], **EXACT)
        assert_same_states(out.cache, alone.cache, **EXACT)


@every_variant
@torch.no_grad()
def test_a_padded_batch_may_be_cut_anywhere(variant):
    """Also where some rows, or all of them, have nothing but padding in a piece."""
    model = make_model(variant)
    ids, mask = pad([make_tokens(n, seed=n) for n in (15, 9, 1)], T, "left")
    whole = model(ids, attention_mask=mask, use_cache=True)
    for cuts in ([2, 3, 11, 18], list(range(1, T))):
        logits, cache = read_in_pieces(model, ids, cuts, attention_mask=mask)
        torch.testing.assert_close(logits[mask == 1], whole.logits[mask == 1], **EXACT)
        assert_same_states(cache, whole.cache, **EXACT)


@every_variant
def test_packed_sequences_equal_separate_ones(variant):
    """Logits and every parameter's gradient, by each of the ways to say where a sequence begins."""
    model = make_model(variant)
    rows = [make_tokens(1, n, seed=n) for n in (11, 1, 8, 5)]
    separate = [model(row).logits[0] for row in rows]
    loss = sum((logits**2).sum() for logits in separate)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)

    lengths = torch.tensor([row.shape[1] for row in rows])
    ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    ways = {
        "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
        "cu_seqlens": {"cu_seqlens": ends},
        "cu_seq_lens_q": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 11, "max_length_k": 11},
        "seq_idx": {"seq_idx": torch.arange(4).repeat_interleave(lengths)[None]},
    }
    for name, arguments in ways.items():
        logits = model(torch.cat(rows, dim=1), **arguments).logits[0]
        torch.testing.assert_close(logits, torch.cat(separate), **EXACT, msg=lambda m, n=name: f"{n}: {m}")
    gradients = torch.autograd.grad((logits**2).sum(), parameters, allow_unused=True)
    for (name, _), ours, theirs in zip(model.named_parameters(), gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_packed_rows_with_padding():
    """Two rows, each of two sequences, padded on the left: position_ids of real tokens alone count."""
    model = make_model()
    a, b, c, d = (make_tokens(n, seed=n) for n in (5, 6, 9, 2))
    ids, mask = pad([torch.cat([a, b]), torch.cat([c, d])], 13, "left")
    positions, _ = pad([torch.cat([torch.arange(len(x)) for x in pair]) for pair in ((a, b), (c, d))], 13, "left")
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[mask == 1]
    torch.testing.assert_close(logits, torch.cat([model(x[None]).logits[0] for x in (a, b, c, d)]), **EXACT)


@torch.no_grad()
def test_rows_never_join():
    """Also where the ids of one row go on in the next."""
    model, tokens = make_model(), make_tokens(2, 6)
    expected = torch.cat(
        [model(tokens[row : row + 1, part]).logits for row, part in ((0, slice(4)), (0, slice(4, 6)))], 1
    )
    for name, ids in (("seq_idx", [[0, 0, 0, 0, 1, 1], [1] * 6]), ("position_ids", [[0, 1, 2, 3, 0, 1], range(2, 8)])):
        logits = model(tokens, **{name: torch.tensor([list(row) for row in ids])}).logits
        torch.testing.assert_close(logits[:1], expected, **EXACT)
        torch.testing.assert_close(logits[1:], model(tokens[1:]).logits, **EXACT)


@pytest.mark.parametrize("variant", ["mlp", "hybrid-windows", "titans-mal", "titans-mag", "titans-mac"])
@torch.no_grad()
def test_padding_inside_a_row_is_no_boundary(variant):
    """Nor a distance, for attention within windows of a model whose cache does not grow."""
    model, row = make_model(variant), make_tokens(1, 9)
    ids, mask = torch.zeros(1, 12, dtype=torch.long), torch.zeros(1, 12, dtype=torch.long)
    where = [0, 1, 4, 5, 6, 7, 9, 10, 11]
    ids[0, where], mask[0, where] = row[0], 1
    out = model(ids, attention_mask=mask, position_ids=torch.arange(12)[None], use_cache=True)
    alone = model(row, use_cache=True)
    torch.testing.assert_close(out.logits[mask == 1], alone.logits[0], **EXACT)
    assert_same_states(out.cache, alone.cache, **EXACT)


@every_variant
def test_gradients_flow_through_the_cache(variant):
    """Truncated or not is the caller's choice (`MemoryState.detach`): a cut read has the gradients of a whole one."""
    model, tokens = make_model(variant), make_tokens(2, T)
    parameters = list(model.parameters())
    whole = torch.autograd.grad(model(tokens).logits[:, -5:].square().sum(), parameters, allow_unused=True)
    logits, _ = read_in_pieces(model, tokens, [6, 13])
    cut = torch.autograd.grad(logits[:, -5:].square().sum(), parameters, allow_unused=True)
    for (name, _), ours, theirs in zip(model.named_parameters(), cut, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", ["mlp", "linear", "mlp-muon"])
@torch.no_grad()
def test_float32(variant):
    """The default precision keeps what float64 shows: cut = whole = float64."""
    model, tokens = make_model(variant, torch.float32), make_tokens(2, T)
    whole = model(tokens).logits
    torch.testing.assert_close(read_in_pieces(model, tokens, [3, 9])[0], whole, **SINGLE)
    torch.testing.assert_close(whole, make_model(variant)(tokens).logits.float(), **SINGLE)
