"""TRL's SFTTrainer on a handful of examples: every way in which it lays out a batch, LoRA, and the swap of stage 2."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import ByT5Tokenizer

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train import TwoStageCallback, load_lora, lora_config

trl = pytest.importorskip("trl", reason="TRL is not installed: the extra dev")

TEXTS = ["the memory reads ", "one token and then ", "another while it learns to ", "forget what no longer helps "]


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    config = TNTConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=1, num_heads=2, head_dim=16, intermediate_size=32,
        global_chunk_size=16, local_chunk_sizes=[8], local_shard_lengths=16, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    TNTForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fine_tune(base, data="text", lora=False, **arguments):
    """Four steps, of which the last two are of stage 2: the trainer and its losses."""
    rows = [{"text": text} if data == "text" else {"prompt": text, "completion": text[::-1]} for text in TEXTS]
    model = TNTForCausalLM.from_pretrained(base)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(base.parent / "run"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
            use_cpu=True, bf16=False, logging_steps=1, save_steps=2, report_to=[], disable_tqdm=True, **arguments,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=ByT5Tokenizer(),
        callbacks=[TwoStageCallback([1], step=2)],
        peft_config=lora_config(model, r=4) if lora else None,
    )  # fmt: skip
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_batches_without_padding_give_the_losses_of_padded_ones(base):
    trainer, padded = fine_tune(base)
    assert padded[-1] < padded[0]
    run = base.parent / "run"
    chunks = [TNTConfig.from_pretrained(run / f"checkpoint-{step}").local_chunk_sizes for step in (2, 4)]
    assert chunks == [[8], [1]]
    # Flattened to one row with position_ids; float32 sums in another order, over four steps.
    assert fine_tune(base, padding_free=True, max_length=None)[1] == pytest.approx(padded, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"data": "completion"}, {"packing": True, "max_length": 64}])
def test_other_layouts(base, options):
    losses = fine_tune(base, **options)[1]
    assert losses[-1] < losses[0]


def test_lora(base):
    trainer, losses = fine_tune(base, lora=True)
    assert losses[-1] < losses[0]
    # Copies of the local memories are trained besides, and decay as little as what they are copies of.
    names = trainer.get_decay_parameter_names(trainer.model)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable & set(names) == {name for name in trainable if ".lora_" in name} != trainable
    loaded = load_lora(base.parent / "run" / "checkpoint-4")
    assert loaded.config.local_chunk_sizes == [1]
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, trainer.model.eval()(tokens).logits)
