"""Further cases of context parallelism: several calls, wrappers, errors, bytes, and ranks that die."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from context_parallel_cases import (
    GRID,
    PADDED,
    TITANS,
    VARIANT,
    Case,
    Found,
    keep_gradients,
    keep_states,
    measure,
    new_model,
    plain,
    train_step,
)
from context_parallel_workers import Ranks
from model_cases import make_tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from modeling_tnt import TNTConfig, TNTForSequenceClassification
from modeling_tnt.compat import enable_checkpointing
from modeling_tnt.context_parallel import ContextParallelError, boundary_bytes

# Several calls


def accumulate(ranks: Ranks) -> Found:
    """Two batches of other lengths before the gradients are looked at."""
    model, found = new_model(VARIANT), Found()
    ranks.enable(model, part_multiple=1)
    for i, length in enumerate((37, 22)):
        train_step(model, plain(2, length, seed=i), found, f"{i}.")
    keep_gradients(model, found)
    return found


def take_turns(ranks: Ranks, order: tuple[int, int]) -> Found:
    """Two models on one group: both go forward, then both backward, in this order."""
    models, found = [new_model(VARIANT), new_model("linear-plain-two-locals")], Found()
    losses = []
    for i, model in enumerate(models):
        ranks.enable(model, part_multiple=1)
        losses.append(model.train()(**plain(2, 30 + i, seed=i)).loss)
    for i in order:
        losses[i].backward()
        keep_gradients(models[i], found, f"{i}.")
    return found


def go_backward_once(ranks: Ranks) -> Found:
    """Two forward passes of one model, whose losses are added."""
    model, found = new_model(VARIANT).train(), Found()
    ranks.enable(model, part_multiple=1)
    loss = model(**plain(2, 21)).loss + model(**plain(1, 34, seed=2)).loss
    loss.backward()
    found.every["loss"] = loss.detach()
    keep_gradients(model, found)
    return found


def own_loss(ranks: Ranks) -> Found:
    """A loss of the caller's, a sum over the columns that a rank has: times the ranks, since the mean counts."""
    model, found = new_model(VARIANT).train(), Found()
    ranks.enable(model, part_multiple=1)
    weights = torch.randn(2, 37, model.config.vocab_size, generator=torch.Generator().manual_seed(3)).double()
    logits = model(make_tokens(2, 37)).logits
    if ranks.group is not None:
        weights = weights[:, model.context_parallel.columns(37)]
    (ranks.size * (logits * weights).sum()).backward()
    keep_gradients(model, found)
    return found


def hidden_states(ranks: Ranks) -> Found:
    """Of the model without a head."""
    model, found = new_model(VARIANT).model, Found()
    ranks.enable(model)
    with torch.no_grad():
        out = model(make_tokens(2, 37), output_hidden_states=True, use_cache=True)
    found.columns = {str(i): hidden for i, hidden in enumerate(out.hidden_states)}
    found.columns["last"] = out.last_hidden_state
    keep_states(out.cache, found)
    return found


def read_on(ranks: Ranks, variant: str) -> Found:
    """Three calls behind one cache: with padding, of a single token, and of fewer tokens than the convolution sees."""
    model, found, cache = new_model(variant), Found(), None
    ranks.enable(model, part_multiple=1)
    mask = torch.cat([PADDED["left"]["attention_mask"], torch.ones(4, 20, dtype=torch.int64)], dim=1)
    for begin, end in ((0, 30), (30, 31), (31, 34), (34, 60)):
        batch = {"input_ids": make_tokens(4, 60)[:, begin:end], "attention_mask": mask[:, :end]}
        with torch.no_grad():
            out = model(**batch, cache=cache, use_cache=True)
        cache = out.cache
        found.columns[f"{begin}.logits"] = out.logits
        keep_states(cache, found, f"{begin}.")
    return found


def memorize(ranks: Ranks, variant: str) -> Found:
    """A document in pieces, another behind it, and then every rank generates by itself."""
    model, found, prompt = new_model(variant), Found(), make_tokens(2, 3, seed=5)
    documents = [make_tokens(57, seed=1), make_tokens(33, seed=2)]
    ranks.enable(model)
    state = model.memorize(documents, chunk_length=24, progress=False)
    keep_states(state, found, "first.")
    state = model.memorize(make_tokens(2, 19, seed=3), state=state, chunk_length=24, progress=False)
    keep_states(state, found, "second.")
    generate = partial(model.generate, prompt, do_sample=False, max_new_tokens=5)
    if ranks.group is None:
        found.every |= {"paused": generate(cache=state.clone()), "disabled": generate(cache=state.clone())}
        return found
    with model.pause_context_parallel():
        found.every["paused"] = generate(cache=state.clone())
    assert model.context_parallel is not None
    model.disable_context_parallel()
    assert model.context_parallel is None
    found.every["disabled"] = generate(cache=state.clone())
    return found


def turn_off(ranks: Ranks) -> Found:
    """Paused and disabled, a model gives all columns and the whole gradient again; enabled once more, its part."""
    model, found, batch = new_model(VARIANT).train(), Found(), plain(2, 37)
    ranks.enable(model)
    if ranks.group is not None:
        with model.pause_context_parallel():
            found.every["paused"] = model(**batch).logits.detach()
        model.disable_context_parallel()
        found.every["disabled"] = model(**batch).logits.detach()
    else:
        found.every = {name: model(**batch).logits.detach() for name in ("paused", "disabled")}
    ranks.enable(model, part_multiple=1)
    train_step(model, batch, found)
    keep_gradients(model, found)
    return found


# Wrappers


def wrapped(
    ranks: Ranks, wrap: str, outer: int, part_multiple: int, prepare: Callable[[nn.Module], None] = lambda model: None
) -> Found:
    """Two steps of DDP or FSDP2 over a grid of `outer` times the ranks of a group, each row with a batch of its own."""
    model, found = new_model(VARIANT).train(), Found()
    prepare(model)
    batches = [plain(2, 37, seed=i) for i in range(outer)]
    call: nn.Module = model
    if ranks.group is not None:
        mesh = ranks.grid(outer)
        batches = [batches[mesh.get_local_rank("dp")]]
        if wrap == "ddp":
            call = DistributedDataParallel(model, process_group=ranks.group)
        else:
            for part in (*model.model.layers, model):
                fully_shard(part, mesh=init_device_mesh("cpu", (ranks.size,)))
        model.enable_context_parallel(mesh, part_multiple=part_multiple)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        losses = [call(**batch).loss for batch in batches]
        loss = sum(losses) / len(losses)
        loss.backward()
        found.mean[f"{step}.loss"] = loss.detach()
        found.every |= {f"{step}.grad.{n}": _whole(p.grad).clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    found.every |= {n: _whole(p.detach()) for n, p in model.named_parameters()}
    return found


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


# What the ranks check themselves


def errors(ranks: Ranks) -> Found:
    """Each on every rank, and before anything is sent: the group serves the next call."""
    model = new_model(VARIANT)
    ranks.enable(model)
    ids, fails = make_tokens(2, 24), partial(pytest.raises, ValueError)
    own = make_tokens(2, 24, seed=ranks.rank)
    mask = torch.ones_like(ids)
    differing = {
        "input_ids": {"input_ids": own},
        "length": {"input_ids": make_tokens(2, 24 + ranks.rank)},
        "rows": {"input_ids": make_tokens(2 + ranks.rank, 24)},
        "labels": {"input_ids": ids, "labels": own},
        "a row less labelled": {"input_ids": ids, "labels": ids} if ranks.rank else {"input_ids": ids},
        "mask": {"input_ids": ids, "attention_mask": mask.index_fill(1, torch.tensor([ranks.rank]), 0)},
        "no mask": {
            "input_ids": ids,
            "attention_mask": None if ranks.rank else mask.index_fill(1, torch.tensor([0]), 0),
        },
        "positions": {"input_ids": ids, "position_ids": torch.arange(24)[None] % (9 + ranks.rank)},
        "indices": {"input_ids": ids, "seq_idx": (torch.arange(24) > 7 + ranks.rank).long()[None]},
        "boundaries": {"input_ids": ids[:1], "cu_seqlens": torch.tensor([0, 7 + ranks.rank, 24])},
        "a divisor": {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(40 + ranks.rank)},
    }
    model.train()
    for name, batch in differing.items():
        with fails():
            model(**batch)
            raise AssertionError(f"other {name} on each rank raised nothing")
    with fails(match="logits_to_keep"):
        model(ids, logits_to_keep=1)
    with fails(match="generate"):
        model.generate(ids, max_new_tokens=2)
    model.eval()
    with fails(match="use_cache|cache"):
        model(ids, use_cache=True)
    with torch.no_grad():
        with pytest.raises(ValueError, match="generate"):
            model.generate(ids, max_new_tokens=2)
        with fails(match="logits_to_keep"):
            model(ids, logits_to_keep=torch.tensor([3]))
        with model.pause_context_parallel():
            cache = model(ids, use_cache=True).cache
            state, other = (model.memorize(make_tokens(n), progress=False) for n in (9, 9 + ranks.rank))
        for name, given in {
            "cache": {"cache": other},
            "no cache": {"cache": None if ranks.rank else state},
            "use_cache": {"use_cache": ranks.rank == 0},
        }.items():
            with fails(match="cache"):
                model(ids[:1], **given)
                raise AssertionError(f"other {name} on each rank raised nothing")
    with fails(match="cache"):
        model(ids, cache=cache)
    with fails(match="cache"), torch.set_grad_enabled(ranks.rank == 0):
        model(ids)
    assert model.context_parallel.sent_bytes == 0
    with torch.no_grad():
        assert model(ids).logits.shape[1] == len(model.context_parallel.columns(24)) < 24
    return Found()


def wrong_groups(ranks: Ranks) -> Found:
    """Arguments that are no group of this rank, multiples that are none, and a model that has no columns."""
    model = new_model("mlp")
    other, grid = dist.new_group([0], backend="gloo"), ranks.grid(1)
    places = torch.arange(ranks.size)[None]
    without_cp = DeviceMesh.from_group(grid.get_all_groups(), "cpu", places, mesh_dim_names=("dp", "tp"))
    for group in (None, "cp", ranks.size, [0, 1], without_cp):
        with pytest.raises((TypeError, ValueError), match="group_or_mesh"):
            model.enable_context_parallel(group)
        assert model.context_parallel is None
    if ranks.rank:
        with pytest.raises(ValueError, match="group_or_mesh"):
            model.enable_context_parallel(other)
        assert model.context_parallel is None
    for multiple in (0, -8, True, 1.5, "8"):
        with pytest.raises((TypeError, ValueError), match="part_multiple"):
            model.enable_context_parallel(ranks.group, part_multiple=multiple)
        assert model.context_parallel is None
    classifier = TNTForSequenceClassification(TNTConfig(**model.config.to_dict() | {"num_labels": 2}))
    with pytest.raises(TypeError, match="TNTForSequenceClassification cannot be context parallel"):
        classifier.enable_context_parallel(ranks.group)
    return Found()


def count_bytes(ranks: Ranks) -> Found:
    """What a rank sends is what the formula says of its two cuts, and does not grow with the length."""
    for variant, config, length, multiple in (
        (VARIANT, {}, 64, None),
        (VARIANT, {}, 128, None),
        (VARIANT, {}, 37, 1),
        ("linear-plain-two-locals", {}, 42, 1),
        ("linear-plain-two-locals", {}, 64, None),
        ("linear-momentum-chunk", {}, 45, 3),
        ("mlp-token-scale", {}, 45, 5),
        ("mlp", TITANS, 64, None),
        ("mlp-muon", {"num_hidden_layers": 3}, 45, 1),
        ("global-only", {}, 37, 1),
    ):
        for dtype in (torch.float32, torch.float64):
            model = new_model(variant, dtype, **config).train()
            ranks.enable(model, part_multiple=multiple)
            context, columns = model.context_parallel, model.context_parallel.columns(length)
            for _ in range(2):
                loss = model(**plain(2, length)).loss
                forward = context.sent_bytes
                loss.backward()
                ahead, behind = (
                    sum(boundary_bytes(model.config, cut, 2, dtype).values()) if 0 < cut < length else 0
                    for cut in (columns.stop, columns.start)
                )
                found = forward, context.sent_bytes - forward
                layers = model.config.num_hidden_layers
                assert found == (layers * ahead, layers * behind), (variant, length, dtype, found, ahead, behind)
                assert context.waited_seconds >= 0
                context.reset_counts()
                assert context.sent_bytes == 0 and context.waited_seconds == 0
    return Found()


# Deaths

DEATH_PATIENCE = timedelta(seconds=5)


def die(ranks: Ranks, who: int, where: str) -> Found:
    """Rank `who` dies in a step; the others must say so, at the latest in the next step, and within the time limit."""
    model = new_model(VARIANT).train()
    ranks.enable(model, part_multiple=1)
    train_step(model, plain(2, 37), Found())  # connections are there
    if ranks.rank == who:
        layer = model.model.layers[1 if where == "forward" else 0]
        if where == "forward":
            layer.register_forward_pre_hook(lambda *_: os._exit(17))
        elif where == "backward":
            layer.mlp.register_full_backward_hook(lambda *_: os._exit(17))
        else:
            time.sleep(DEATH_PATIENCE.total_seconds() + 12)  # as one that hangs
            os._exit(17)
    began = time.monotonic()
    with pytest.raises(ContextParallelError) as raised:
        for _ in range(2):
            train_step(model, plain(2, 37), Found())
    # The rest is for a busy machine.
    assert time.monotonic() - began < DEATH_PATIENCE.total_seconds() + 10, "waited longer than the group's time limit"
    assert f"rank {ranks.rank} of {ranks.size} in the context-parallel group could not" in str(raised.value)
    return Found()


def _programs() -> dict[str, Case]:
    cases = {
        "accumulated": Case(accumulate),
        "two-models-in-order": Case(partial(take_turns, order=(0, 1))),
        "two-models-in-reverse": Case(partial(take_turns, order=(1, 0))),
        "two-forwards-one-backward": Case(go_backward_once),
        "own-loss": Case(own_loss),
        "hidden-states": Case(hidden_states),
        "turned-off": Case(turn_off),
        "errors": Case(errors, None),
        "wrong-groups": Case(wrong_groups, None),
        "bytes": Case(count_bytes, None),
        "some-ranks": Case(measure(VARIANT, part_multiple=1), members=(1, 2), sizes=(3,)),
        "one-rank": Case(measure(VARIANT, part_multiple=1), members=(1,), sizes=(2,)),
        "mesh": Case(measure(on_mesh=lambda ranks: ranks.grid(1)["cp"] if ranks.group else None)),
        "mesh-of-two-dimensions": Case(measure(on_mesh=lambda ranks: ranks.grid(1) if ranks.group else None)),
    }
    for variant in (VARIANT, "linear-momentum-chunk", "linear-plain-two-locals", "mlp-token-scale"):
        fast = variant in (VARIANT, "linear-plain-two-locals")
        cases[f"memorize-{variant}"] = Case(partial(memorize, variant=variant), fast=fast)
        cases[f"read-on-{variant}"] = Case(partial(read_on, variant=variant), fast=fast)
    for wrap in ("ddp", "fsdp2"):
        for name, multiple in {"": 1, "-with-an-empty-part": 40}.items():
            case = partial(wrapped, wrap=wrap, part_multiple=multiple)
            cases[f"{wrap}{name}"] = Case(partial(case, outer=1), sizes=(2, 3))
            cases[f"{wrap}-of-groups{name}"] = Case(partial(case, outer=2), sizes=(4,))
        cases[f"{wrap}-checkpointing"] = Case(
            partial(wrapped, wrap=wrap, outer=1, part_multiple=40, prepare=enable_checkpointing), fast=False
        )
    for where in ("forward", "backward", "sleep"):
        for size, who in ((2, 1), (2, 0), (3, 1)):
            cases[f"rank-{who}-of-{size}-{where}"] = Case(
                partial(die, who=who, where=where),
                None,
                dead=(who,),
                sizes=(size,),
                patience=DEATH_PATIENCE,
                fast=where != "sleep",
            )
    return cases


# The fast ones over two ranks, and all in turns over three or four: each kind of case is cut by all numbers, in a third
# of the time.
CASES = {
    name: replace(case, sizes=(2, 3 + i % 2) if case.fast else (3 + i % 2,)) if len(case.sizes) == 3 else case
    for i, (name, case) in enumerate((GRID | _programs()).items())
}
