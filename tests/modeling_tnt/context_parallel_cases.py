"""Cases of context parallelism: one process runs each, and so does every rank of a group; the numbers must agree."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import peft
import torch
from context_parallel_workers import PATIENCE, Ranks
from model_cases import MEMORIES_ALONE, make_model, make_tokens, state_tensors
from torch import Tensor

from modeling_tnt import TNTForCausalLM
from modeling_tnt.compat import enable_checkpointing

Batch = dict[str, Any]

# The same sums in another order, through two layers; relative to the largest entry of a tensor, see `differences`.
FLOAT64, FLOAT32 = 1e-10, 1e-5
# A rank and one process round other sums to bfloat16, whose 8 bits are 0.4%: a few times that, in two layers.
BFLOAT16 = 2e-2


@dataclass
class Found:
    """What a process has found, by how that of the ranks is to agree with that of one process.

    every    tensors that each rank has as one process has them.
    mean     tensors whose mean over the ranks is that of one process; None, a gradient that is not there, on any rank.
    columns  [B, T, …], of which each rank has its own columns.
    """

    every: dict[str, Tensor] = field(default_factory=dict)
    mean: dict[str, Tensor | None] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """`run` on every rank, and with `Ranks()` in one process.

    tolerance  by which they may differ; None: a case that checks its ranks itself, and has nothing to compare.
    members    those of the run's ranks that form the group; None: all.
    dead       the ranks that die in it.
    sizes      the numbers of ranks with which it is run.
    patience   the time limit of its group.
    fast       whether the fast set has it, with two ranks.
    """

    run: Callable[[Ranks], Found]
    tolerance: float | None = FLOAT64
    members: tuple[int, ...] | None = None
    dead: tuple[int, ...] = ()
    sizes: tuple[int, ...] = (2, 3, 4)
    patience: timedelta = PATIENCE
    fast: bool = True


VARIANT = "mlp-momentum-forget"

# Batches


def plain(*shape: int, seed: int = 1, **others: Any) -> Batch:
    """Token ids [rows, tokens], which are their own labels."""
    ids = make_tokens(*shape, seed=seed)
    return {"input_ids": ids, "labels": ids, **others}


def padded(hidden: Sequence[Sequence[int] | slice], length: int = 40) -> Batch:
    """A row for each entry, which names its columns of padding."""
    ids, mask = make_tokens(len(hidden), length), torch.ones(len(hidden), length, dtype=torch.int64)
    for row, columns in zip(mask, hidden, strict=True):
        row[columns] = 0
    return {"input_ids": ids * mask, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def unlabelled(batch: Batch, *columns: int | slice) -> Batch:
    """Without the labels of some columns."""
    labels = batch["labels"].clone()
    for some in columns:
        labels[:, some] = -100
    return batch | {"labels": labels}


NONE = slice(0, 0)
PADDED = {
    "left": padded([NONE, slice(5), slice(23), slice(39)]),
    "right": padded([NONE, slice(35, None), slice(17, None), slice(1, None)]),
    "inner": padded([slice(10, 30), range(0, 40, 3), slice(1, 39), [19, 20, 21]]),
    "whole-row": padded([NONE, slice(None), slice(8, 16)]),
    "first-part": padded([slice(25), slice(31)]),
    "last-part": padded([slice(19, None), slice(9, None)]),
    "everything": padded([slice(None), slice(None)]) | {"num_items_in_batch": torch.tensor(7)},
}
ROWS_OF_POSITIONS = torch.stack([torch.arange(40), torch.arange(40) % 13, (torch.arange(40) + 7) % 20])
PACKED = {
    "boundaries": plain(1, 40, cu_seqlens=torch.tensor([0, 3, 17, 17, 33, 40])),
    "short-sequences": plain(1, 40, cu_seqlens=torch.tensor([0, *range(1, 41, 3)])),
    "boundaries-of-transformers": plain(
        1, 40, cu_seq_lens_q=torch.tensor([0, 20, 40]), cu_seq_lens_k=torch.tensor([0, 20, 40]), max_length_q=20,
        max_length_k=20,
    ),
    "positions": plain(3, 40, position_ids=ROWS_OF_POSITIONS),
    "positions-of-all-rows": plain(2, 40, position_ids=torch.arange(40)[None] % 29),
    "indices": plain(2, 40, seq_idx=torch.tensor([[0] * 11 + [1] * 29, [0] * 20 + [1] * 1 + [2] * 19])),
    "padded-positions": padded([NONE, slice(24, None), slice(18, 23)]) | {"position_ids": ROWS_OF_POSITIONS},
}  # fmt: skip
LABELS = {
    "none-at-cuts": unlabelled(plain(2, 40), 9, 10, 13, 14, 19, 20, 21, 24),
    "none-behind-cuts": unlabelled(plain(2, 40), 20, 24),
    "second-half": unlabelled(plain(2, 40), slice(26)),
    "first-half": unlabelled(plain(2, 40), slice(10, None)),
    "last-column": unlabelled(plain(2, 40), slice(39)),
    "divided-by-a-number": plain(2, 40, num_items_in_batch=torch.tensor(53)),
}


# What a case measures


def new_model(variant: str, dtype: torch.dtype = torch.float64, **config: Any) -> TNTForCausalLM:
    """The same in every process. In float64 its loss is, too; that of transformers is in float32 always."""
    model = make_model(variant, dtype, **config)
    if dtype == torch.float64:
        model.loss_function = _loss
    return model


def _loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def train_step(model: TNTForCausalLM, batch: Batch, found: Found, name: str = "") -> None:
    """Forward and backward, which adds to the gradients; see `keep_gradients`."""
    model.train()
    out = model(**batch)
    found.every[f"{name}loss"] = out.loss.detach()
    found.columns[f"{name}logits"] = out.logits.detach()
    out.loss.backward()


def keep_gradients(model: TNTForCausalLM, found: Found, name: str = "") -> None:
    for parameter, p in model.named_parameters():
        found.mean[f"{name}grad.{parameter}"] = None if p.grad is None else p.grad.clone()


@torch.no_grad()
def read(model: TNTForCausalLM, batch: Batch, found: Found, cache: Any = None) -> Any:
    """Without gradients, the states at the end included. Returns the cache."""
    model.eval()
    out = model(**batch, cache=cache, use_cache=True)
    keep_states(out.cache, found)
    found.every["reading.loss"] = out.loss
    found.columns["reading.logits"] = out.logits
    return out.cache


def keep_states(cache: Any, found: Found, name: str = "") -> None:
    found.every |= {f"{name}{n}": t.clone() for n, t in state_tensors(cache).items()}
    found.every[f"{name}tokens"] = torch.stack([layer.tokens_read for layer in cache.layers])
    found.every[f"{name}columns"] = torch.tensor(cache.get_seq_length())


def measure(
    variant: str = "mlp",
    batch: Batch | None = None,
    *,
    part_multiple: int | None = None,
    dtype: torch.dtype = torch.float64,
    has_states: bool = True,
    as_embeds: bool = False,
    prepare: Callable[[TNTForCausalLM], Any] = lambda model: None,
    autocast: bool = False,
    on_mesh: Callable[[Ranks], Any] = lambda ranks: None,
    **config: Any,
) -> Callable[[Ranks], Found]:
    """A case: a step of training, then the same batch is read without gradients, with its states.

    has_states: of a batch of packed sequences, and of one of padding, one process keeps none.

    as_embeds: give inputs_embeds, whose gradient counts, too.
    prepare: what is done with the model first.
    on_mesh: makes what is given instead of the group.
    """
    batch = plain(2, 37) if batch is None else batch

    def run(ranks: Ranks) -> Found:
        model, given, found = new_model(variant, dtype, **config), dict(batch), Found()
        prepare(model)
        ranks.enable(model, on_mesh(ranks), part_multiple=part_multiple)
        if as_embeds:
            given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            train_step(model, given, found)
            keep_gradients(model, found)
            if as_embeds:
                found.mean["grad.inputs_embeds"] = given["inputs_embeds"].grad
            if has_states:
                read(model, given, found)
        return found

    return run


def _checkpoint(model: TNTForCausalLM, reentrant: bool) -> None:
    # Its name since transformers 5.24.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def _train_only(*parts: str) -> Callable[[TNTForCausalLM], None]:
    """Freeze all parameters but those in whose name one of the parts is."""

    def freeze(model: TNTForCausalLM) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(any(part in name for part in parts))

    return freeze


def _adapt(model: TNTForCausalLM, **options: Any) -> None:
    """LoRA, whose adapters are not zero at the start here."""
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, init_lora_weights=False, **options), model)


TTT = {"token_scale": True, "global_chunk_size": None, "local_shard_lengths": None, "qk_projection": "none"}
TITANS = {
    "global_chunk_size": None, "local_shard_lengths": [None], "qk_projection": "none", "use_momentum": True,
    "use_forget_gate": True,
}  # fmt: skip
CONFIGS = {
    "three-locals": {"local_chunk_sizes": [1, 4, 2], "local_shard_lengths": [4, 16, None], "use_momentum": True},
    "titans": TITANS,
    "titans-linear": TITANS | {"memory_type": "linear", "conv_kernel_size": 0},
    "titans-of-linear-depth": TITANS | {"memory_depth": 1, "local_chunk_sizes": [3]},
    "ttt-linear": TTT | {"memory_type": "linear"},
    "ttt-mlp": TTT,
    "ttt-with-shards": {"token_scale": True, "memory_type": "linear", "normalize_projection": True},
    "chunk-projection-normalized": {"qk_projection": "chunk", "normalize_projection": True, "local_chunk_sizes": [8]},
    "shard-projection-without-reset": {"local_shard_lengths": None, "use_forget_gate": True},
    "no-projection": {"qk_projection": "none", "use_momentum": True},
    "no-convolution": {"conv_kernel_size": 0},
    "wide-convolution": {"conv_kernel_size": 7},
    "convolution-of-one": {"conv_kernel_size": 1},
    "depth-three-forget": {"memory_depth": 3, "use_forget_gate": True, "memory_base_lr": 0.2},
    "muon-without-momentum": {"global_update": "muon"},
    "global-only-momentum": {"local_chunk_sizes": [], "use_momentum": True, "use_forget_gate": True},
    "large-global-chunk": {"global_chunk_size": 24, "use_momentum": True},
    "torch": {"kernel_backend": "torch", "use_momentum": True},
    "one-layer": {"num_hidden_layers": 1},
}  # fmt: skip


def _grid() -> dict[str, Case]:
    """Cases of one step of training and one of reading."""
    cases = {}
    for name in MEMORIES_ALONE:
        cases[f"{name}-cut-anywhere"] = Case(measure(name, part_multiple=1))
        cases[f"{name}-cut-at-shards"] = Case(measure(name, plain(2, 64)), fast=name == VARIANT)
    for name, config in CONFIGS.items():
        cases[f"{name}-cut-anywhere"] = Case(measure(batch=plain(2, 37), part_multiple=1, **config))
        cases[f"{name}-cut-at-chunks"] = Case(measure(batch=plain(2, 45), part_multiple=4, **config), fast=False)
    for name in (VARIANT, "linear-plain-two-locals", "mlp-token-scale", "mlp-three-maps-momentum"):
        cases[f"{name}-float32"] = Case(measure(name, part_multiple=1, dtype=torch.float32), FLOAT32)
    for length in (1, 2, 3, 4, 5, 7, 9, 17):
        batch = plain(2, length, num_items_in_batch=torch.tensor(7))  # a single token has nothing to predict
        cases[f"{length}-tokens"] = Case(measure(VARIANT, batch), fast=False)
        cases[f"{length}-tokens-cut-anywhere"] = Case(measure("linear-momentum-chunk", batch, part_multiple=1))
    for multiple in (3, 5, 16, 64):
        cases[f"parts-of-{multiple}"] = Case(measure(VARIANT, plain(2, 40), part_multiple=multiple))
    for name, batch in PADDED.items():
        kept = {"has_states": name != "everything"}
        cases[f"padding-{name}"] = Case(measure(VARIANT, batch, **kept))
        for variant in ("linear-plain-two-locals", "linear-momentum-chunk"):
            cut_anywhere = measure(variant, batch, part_multiple=1, **kept)
            cases[f"padding-{name}-{variant}"] = Case(cut_anywhere, fast=variant == "linear-momentum-chunk")
    for name, batch in PACKED.items():
        cases[f"packed-{name}"] = Case(measure(VARIANT, batch, has_states=False))
        cut_anywhere = {"part_multiple": 1, "has_states": False}
        cases[f"packed-{name}-cut-anywhere"] = Case(measure("linear-momentum-chunk", batch, **cut_anywhere))
        cases[f"packed-{name}-titans"] = Case(measure(batch=batch, **cut_anywhere, **TITANS), fast=False)
    for name, batch in LABELS.items():
        cases[f"labels-{name}"] = Case(measure(VARIANT, batch, as_embeds=True), fast=False)
        cases[f"labels-{name}-cut-anywhere"] = Case(measure("linear", batch, as_embeds=True, part_multiple=1))
    return cases | _settings()


def _settings() -> dict[str, Case]:
    """Further cases of one step of training and one of reading: settings of the model, of its training, of a group."""
    cases = {}
    for reentrant in (True, False):
        prepare = partial(_checkpoint, reentrant=reentrant)
        name = "reentrant" if reentrant else "anew"
        cases[f"checkpointing-{name}"] = Case(measure(VARIANT, prepare=prepare, part_multiple=1))
        cases[f"checkpointing-{name}-embeds"] = Case(
            measure("mlp-three-maps-momentum", PADDED["inner"], prepare=prepare, as_embeds=True)
        )
    for name, parts in {"layer": ("layers.1.",), "first-layer": ("layers.0.",), "gates": ("_gate",)}.items():
        prepare = _train_only(*parts)
        cases[f"trained-{name}"] = Case(measure(VARIANT, prepare=prepare, part_multiple=1))
        cases[f"trained-{name}-checkpointing"] = Case(
            measure("mlp", prepare=lambda m, f=prepare: (f(m), enable_checkpointing(m)), part_multiple=1)
        )
    adapters = {
        "projections": {"target_modules": ["q_proj", "o_proj", "lr_gate"]},
        "memories": {"target_modules": [], "target_parameters": ["local_memories.0.w1", "global_memory.w2"]},
    }
    for name, options in adapters.items():
        cases[f"adapted-{name}"] = Case(measure(VARIANT, prepare=partial(_adapt, **options), part_multiple=1))
    cases["trained-head"] = Case(measure("linear", prepare=_train_only("lm_head")))
    cases["tied-embeddings"] = Case(measure("linear", tie_word_embeddings=True, part_multiple=1))
    cases["autocast"] = Case(
        measure(VARIANT, plain(2, 40), dtype=torch.float32, autocast=True, part_multiple=1), BFLOAT16
    )
    return cases


def _random(seed: int) -> Case:
    """Any combination of a configuration, a batch and cuts."""
    rng = random.Random(seed)
    chunks = [rng.choice((1, 2, 3, 4, 8)) for _ in range(rng.choice((0, 1, 1, 2)))]
    scaled, projection = bool(chunks) and rng.random() < 0.2, rng.choice(("shard", "chunk", "none"))
    config = {
        "local_chunk_sizes": chunks,
        "local_shard_lengths": [None if rng.random() < 0.3 else c * rng.randint(1, 5) for c in chunks],
        "global_chunk_size": None if chunks and rng.random() < 0.3 else rng.randint(1, 20),
        "memory_type": rng.choice(("linear", "mlp")), "qk_projection": projection,
        "normalize_projection": projection != "none" and rng.random() < 0.5, "token_scale": scaled,
        "use_momentum": not scaled and rng.random() < 0.5, "use_forget_gate": not scaled and rng.random() < 0.5,
        "conv_kernel_size": rng.choice((0, 2, 4, 6)), "memory_base_lr": 0.2, "global_memory_base_lr": 0.2,
    }  # fmt: skip
    length, rows, g = rng.randint(1, 50), rng.randint(1, 4), torch.Generator().manual_seed(seed)
    batch = plain(rows, length, seed=seed, num_items_in_batch=torch.tensor(31))
    if rng.random() < 0.5:
        shown = torch.rand(rows, length, generator=g) < torch.rand(rows, 1, generator=g)
        shown[0, -1] = True  # without any token there are no states
        batch |= {"attention_mask": shown.long(), "labels": batch["labels"].masked_fill(~shown, -100)}
    packed = rng.random() < 0.4
    if packed:
        batch["seq_idx"] = (torch.rand(rows, length, generator=g) < 0.1).cumsum(1)
    prepare = partial(_checkpoint, reentrant=False) if rng.random() < 0.2 else lambda model: None
    cut = {"part_multiple": rng.choice((None, 1, 1, 2, 5, 8)), "prepare": prepare, "has_states": not packed}
    return Case(measure("mlp", batch, as_embeds=rng.random() < 0.3, **cut, **config), fast=False)


GRID = _grid() | {f"random-{seed}": _random(seed) for seed in range(30)}
