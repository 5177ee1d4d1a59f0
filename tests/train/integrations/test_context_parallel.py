"""Context parallel under transformers' Trainer, which does it for attention, and gives each process rows of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import ParallelismConfig
from transformers import Trainer, TrainingArguments

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train import TwoStageCallback

OWN_ROWS = """
import sys
import torch
from transformers import Trainer, TrainingArguments
from modeling_tnt import TNTConfig, TNTForCausalLM

arguments = TrainingArguments(sys.argv[1], max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
assert arguments.world_size == 2
model = TNTForCausalLM(TNTConfig.from_preset("tiny", num_hidden_layers=1))
model.enable_context_parallel(torch.distributed.group.WORLD)
rows = [{"input_ids": row, "labels": row} for row in torch.arange(16 * 32).view(16, 32) % 200]
try:
    Trainer(model, arguments, train_dataset=rows).train()
except ValueError as error:
    print(f"refused by {arguments.process_index}: {error}", flush=True)
"""


@pytest.fixture(params=["tiny"])
def trainer(tmp_path: Path, fresh_accelerator, monkeypatch, request) -> Trainer:
    """Of a preset's model, told by Accelerate of two processes that share rows. It makes their mesh, which would
    cut the rows, on accelerators only.
    """
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    model = TNTForCausalLM(TNTConfig.from_preset(request.param))
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": torch.arange(8), "labels": torch.arange(8)}])
    # The Trainer asks for it, and accelerate has it from 1.12 on.
    monkeypatch.setattr(ParallelismConfig, "cp_backend", "torch", raising=False)
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(cp_size=2))
    trainer.accelerator._cp_context = lambda **buffers: nullcontext()
    return trainer


def test_the_trainer_refuses_a_model_without_attention(trainer: Trainer):
    """It would cut rows as ring attention needs them."""
    inputs = {"input_ids": torch.ones(1, 8, dtype=torch.long), "labels": torch.ones(1, 8, dtype=torch.long)}
    with pytest.raises(ValueError, match="Context parallelism is supported only with SDPA attention"):
        trainer.training_step(trainer.model, inputs)


@pytest.mark.parametrize("trainer", ["tiny-hybrid", "tiny-mac"], indirect=True)
def test_a_model_with_attention_refuses_the_trainer(trainer: Trainer):
    """Which takes its attention for all that there is."""
    inputs = {"input_ids": torch.ones(1, 8, dtype=torch.long), "labels": torch.ones(1, 8, dtype=torch.long)}
    assert trainer.model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="cp_size=2, .* a memory reads from left to right; use cp_size=1 here"):
        trainer.training_step(trainer.model, inputs)
    assert not trainer.model.eval().training


def test_the_callback_says_what_to_do_instead(trainer: Trainer):
    callback = TwoStageCallback([4], share=0.5)
    with pytest.raises(ValueError, match="cp_size=2, .* for ring attention: .* training.context_parallel"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_processes_with_rows_of_their_own_are_refused(tmp_path: Path):
    """Where the model shares rows and the Trainer does not know: every process says so, and none waits for another."""
    script = tmp_path / "own_rows.py"
    script.write_text(OWN_ROWS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for process in (0, 1):
        assert f"refused by {process}: " in done.stdout
    assert done.stdout.count("must be the same in every rank of the context-parallel group") == 2
