"""`tnt train` from the command line to the files it leaves, and what stops it."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train.cli import main
from modeling_tnt.train.common.output_folder import LOCK
from modeling_tnt.train.data import DataOptions, load_data
from modeling_tnt.train.evaluation.scores import score_rows
from modeling_tnt.train.loop import report, trainer
from modeling_tnt.train.loop.optim import parameter_groups
from modeling_tnt.train.loop.report import read_log


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def _metrics(output_dir: Path) -> dict:
    return json.loads((output_dir / "metrics.json").read_text())


def _steps(output_dir: Path) -> list[dict]:
    return [r for r in read_log(output_dir / "log.jsonl") if r["event"] == "step"]


HEALTH = ("inner_grad_norm", "state_norm", "step_size", "inner_loss", "loss_before", "loss_after")


def test_a_run_from_the_command_line(flags, text_folder: Path, output_dir: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_idle_memories", lambda log: ["1 of 2 memories hardly learn"])
    assert main(flags) == 0
    metrics, scores = _metrics(output_dir), _metrics(output_dir)["validation_bits_per_byte"]

    assert list(scores) == ["bigram", "after_stage1", "after_stage1_at_stage2_chunks", "after_stage2"]
    assert all(0 < score < 9 for score in scores.values())
    assert scores["after_stage1"] != scores["after_stage1_at_stage2_chunks"] != scores["after_stage2"]
    printed = capsys.readouterr().out
    assert all(f"{score:.3f}" in printed for score in scores.values())
    assert printed.endswith("\nwarning  1 of 2 memories hardly learn; see loss.png\n")
    assert metrics["sample"]["continuation"] and metrics["sample"]["prompt"] in printed
    assert [(s["steps"], s["local_chunk_sizes"]) for s in metrics["stages"]] == [(6, [8]), (1, [2])]
    assert (output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["sample"]["prompt"] in (output_dir / "sample.txt").read_text()
    assert {p.name for p in output_dir.rglob(".*")} == {LOCK}

    log = read_log(output_dir / "log.jsonl")
    assert [r["tokens"] for r in _steps(output_dir)] == [128 * i for i in range(1, 8)]
    health = [r for r in log if r["event"] == "memory_health"]
    assert [(r["stage"], r["step"]) for r in health] == [("stage1", 3), ("stage1", 6), ("stage2", 1)]
    assert all(r[f"layer0/{m}/{q}"] > 0 for r in health for m in ("global", "local0") for q in HEALTH)

    # What was saved gives the figures that were printed: same weights, same chunks, same rows.
    options = DataOptions(sources=[str(text_folder)], validation_share=0.2, cache_dir=tmp_path / "other-cache")
    for name, key in (("stage1", "after_stage1"), ("stage2", "after_stage2"), ("best", "best")):
        model = AutoModelForCausalLM.from_pretrained(output_dir / name)
        rows = load_data(options, AutoTokenizer.from_pretrained(output_dir / name)).validation.rows(64)
        value, error = score_rows(model, rows.head(metrics["validation_tokens"] // 64), batch_size=2).bits_per_byte
        expected = metrics["best_validation_bits_per_byte"] if key == "best" else scores[key]
        assert value == pytest.approx(expected, rel=1e-12)  # sums of the same numbers
        logged = [r["standard_error"] for r in log if r["event"] == "validation" and r["name"] == key]
        assert logged == [pytest.approx(error)] or key == "best"
    assert metrics["best_validation_bits_per_byte"] == min(scores["after_stage1"], scores["after_stage2"])
    assert AutoModelForCausalLM.from_pretrained(output_dir / "stage2").config.local_chunk_sizes == [2]


@pytest.mark.slow
def test_equal_seeds_give_equal_runs(flags, tmp_path: Path):
    runs = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        more = ["--output.dir", str(tmp_path / name), "--training.seed", seed, "--stages.stage1.steps", "3"]
        assert main([*flags, *more]) == 0
        metrics = _metrics(tmp_path / name)
        losses = [r["loss_nats_per_token"] for r in _steps(tmp_path / name)]
        runs.append((losses, metrics["sample"], metrics["validation_bits_per_byte"]))
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0]


@pytest.mark.slow
def test_training_learns(flags, output_dir: Path):
    """60 steps halve the bits of an untrained model (8.6); a text of 16 words has few bits per byte."""
    more = ["--stages.stage1.steps", "60", "--optimizer.learning-rate", "0.01", "--output.checkpoint-every", "50"]
    assert main([*flags, *more]) == 0
    assert _metrics(output_dir)["validation_bits_per_byte"]["after_stage1"] < 4.3


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(flags, tmp_path: Path):
    """With documents marked, passes predict different numbers of tokens, and each counts by its tokens."""
    losses, weights = [], []
    more = ["--data.boundaries", "marked", "--training.batch-size", "4", "--training.seq-len", "128"]
    for micro in (4, 2, 1):
        output = tmp_path / str(micro)
        assert main([*flags, *more, "--training.micro-batch-size", str(micro), "--output.dir", str(output)]) == 0
        losses.append([r["loss_nats_per_token"] for r in _steps(output)])
        weights.append(load_file(output / "stage2" / "model.safetensors"))
    # Sums in another order: float32 rounding, which AdamW's division lets grow over 7 steps.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[2][name], expected, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_gradient_checkpointing_and_a_wsd_schedule_and_more_stages(flags, tmp_path: Path, output_dir: Path):
    recipe = {
        "stages": [
            {"name": "wide", "steps": 2, "seq_len": 128, "schedule": "wsd", "decay_share": 0.5},
            {"name": "narrow", "tokens": 300, "chunk_divisor": 2, "schedule": "constant", "learning_rate": 1e-3},
            {"name": "ones", "share": 0.5, "local_chunk_sizes": [1], "local_shard_lengths": [16], "trainable": "local"},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = [f for f in flags if f not in ("--stages.stage1.steps", "6")]
    more = ["--config", str(tmp_path / "recipe.yaml"), "--training.gradient-checkpointing", "--output.eval-every", "1"]
    assert main([*flags, *more]) == 0
    steps = _steps(output_dir)
    assert [(r["stage"], r["step"]) for r in steps] == [
        ("wide", 1), ("wide", 2), ("narrow", 1), ("narrow", 2), ("narrow", 3), ("ones", 1)
    ]  # fmt: skip
    assert [r["learning_rate"] for r in steps] == pytest.approx([3e-3, 3e-4, 1e-3, 1e-3, 1e-3, 3e-4])
    validations = [r["name"] for r in read_log(output_dir / "log.jsonl") if r["event"] == "validation"]
    assert "wide_step_1" in validations and "narrow_step_2" in validations
    config = AutoModelForCausalLM.from_pretrained(output_dir / "ones").config
    assert config.local_chunk_sizes == [1] and config.shard_lengths == [16]
    before, after = (load_file(output_dir / s / "model.safetensors") for s in ("narrow", "ones"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("local_memories" in name for name in changed)


def test_a_stage_with_adapters_is_merged_at_its_end(flags, output_dir: Path):
    assert main([*flags, "--stages.stage2.trainable", "lora", "--stages.stage2.steps", "2",
                 "--stages.stage2.share", "none"]) == 0  # fmt: skip
    from modeling_tnt.train import load_lora

    merged = AutoModelForCausalLM.from_pretrained(output_dir / "stage2").eval()
    adapted = load_lora(output_dir / "stage2" / "adapter").eval()
    tokens = torch.arange(40)[None] + 50
    torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-4)
    assert merged.config.local_chunk_sizes == [2]
    before, after = (load_file(output_dir / s / "model.safetensors") for s in ("stage1", "stage2"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed) and any("local_memories" in name for name in changed)
    assert not any("embed" in name or "norm.weight" in name.rpartition("layers")[2] for name in changed - {
        name for name in changed if "local_memories" in name})  # fmt: skip


@pytest.mark.slow
def test_a_llama_of_the_same_size(flags, output_dir: Path, tmp_path: Path):
    (tmp_path / "one.yaml").write_text("stages: [{name: stage1, steps: 2}]")
    flags = [f for f in flags if f not in ("--stages.stage1.steps", "6")]
    assert main([*flags, "--config", str(tmp_path / "one.yaml"), "--model.architecture", "llama"]) == 0
    model = AutoModelForCausalLM.from_pretrained(output_dir / "stage1")
    assert isinstance(model, LlamaForCausalLM)
    assert list(_metrics(output_dir)["validation_bits_per_byte"]) == ["bigram", "after_stage1"]


@pytest.mark.slow
def test_training_starts_from_a_checkpoint(flags, output_dir: Path, tmp_path: Path):
    """What one run saved, another goes on with: its first loss is that of the saved model on the same rows."""
    assert main(flags) == 0
    start = ["--model.start-from", str(output_dir / "stage1"), "--output.dir", str(tmp_path / "second")]
    at = flags.index("--model.override")
    assert main([*flags[:at], *start, "--stages.stage1.steps", "1"]) == 0
    first = _steps(tmp_path / "second")[0]["loss_nats_per_token"]
    assert first < 0.99 * _steps(output_dir)[0]["loss_nats_per_token"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "second" / "stage2").config.hidden_size == 32


@pytest.mark.slow
def test_trackers_get_what_the_log_gets(flags, output_dir: Path, fresh_accelerator):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main([*flags, "--output.trackers", "tensorboard"]) == 0
    folder = next(p.parent for p in output_dir.rglob("events.out.tfevents*") if "hparams" not in str(p))
    events = event_file.EventAccumulator(str(folder)).Reload()
    written = [e.value for e in events.Scalars("step/loss_nats_per_token")]
    assert written == pytest.approx([r["loss_nats_per_token"] for r in _steps(output_dir)], rel=1e-6)
    assert len(events.Scalars("memory_health/layer0/local0/step_size")) == 3


def test_what_only_reports_costs_no_run_its_end(flags, output_dir: Path, monkeypatch, capsys):
    """With the largest seed, which every later stage adds to."""

    def fails(*args, **kwargs):
        raise KeyError("a bug")

    for name in ("report.save_plot", "trainer.finish_cards", "trainer.generate_final_sample", "saving.write_run_card"):
        monkeypatch.setattr(f"modeling_tnt.train.loop.{name}", fails)
    monkeypatch.setattr(trainer.RunPusher, "push_checkpoint", fails)
    assert main([*flags, "--training.seed", str(2**32 - 1)]) == 0
    printed = capsys.readouterr().out
    for what in ("the plot", "the sample", "the model cards", "the model card of stage1", "the push of a checkpoint"):
        assert printed.count(f"warning  {what} failed (KeyError: 'a bug')") == 1, what
    assert _metrics(output_dir)["sample"] == {"prompt": "", "continuation": ""}
    assert AutoModelForCausalLM.from_pretrained(output_dir / "stage2").config.local_chunk_sizes == [2]


# ------------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_non_finite_number_stops_before_the_weights_change(flags, output_dir: Path, monkeypatch, capsys, where: str):
    """At step 5, behind the checkpoint of step 4."""
    calls = {"forward": 0}
    forward = TNTForCausalLM.forward

    def poisoned(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if self.training:
            calls["forward"] += 1
            if calls["forward"] == 5:
                # A finite loss whose gradient is not: √x at 0.
                spoiled = outputs.loss * 0
                outputs.loss = spoiled + float("nan") if where == "loss" else outputs.loss + spoiled.sqrt()
        return outputs

    monkeypatch.setattr(TNTForCausalLM, "forward", poisoned)
    assert main(flags) == 1
    message = capsys.readouterr().err
    assert f"the {where} is nan at step 5 of stage1" in message
    kept = output_dir / "checkpoints" / "stage1-00000004"
    assert f"the last checkpoint is kept in {kept}" in message and "Traceback" not in message
    assert all(p.isfinite().all() for p in AutoModelForCausalLM.from_pretrained(kept).parameters())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")])  # fmt: skip
def test_too_little_memory_says_what_to_lower(flags, monkeypatch, capsys, error: Exception):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(trainer.Session, "take_step", fails)
    assert main(flags) == 1
    message = capsys.readouterr().err
    assert "out of memory" in message and "--training.micro-batch-size 1" in message
    assert "--training.gradient-checkpointing" in message and "Traceback" not in message


def test_another_runtime_error_is_not_hidden(flags, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(trainer.Session, "take_step", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        main(flags)


def test_a_full_disk_keeps_the_last_checkpoint(flags, output_dir: Path, monkeypatch, capsys):
    save = TNTForCausalLM.save_pretrained

    def full_at_second(self, folder: Path, **options):
        if (output_dir / "checkpoints" / "stage1-00000002").exists():
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder, **options)

    monkeypatch.setattr(TNTForCausalLM, "save_pretrained", full_at_second)
    assert main(flags) == 1
    kept = output_dir / "checkpoints" / "stage1-00000002"
    assert "No space left on device" in (message := capsys.readouterr().err)
    assert f"the last checkpoint is kept in {kept}" in message
    assert [p.name for p in (output_dir / "checkpoints").iterdir()] == [kept.name]
    monkeypatch.undo()
    assert main([*flags, "--resume"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk_is_given_room_by_the_checkpoints_before_the_newest(flags, output_dir: Path, monkeypatch, capsys,
                                                                        keep: int):  # fmt: skip
    """There is room for two. The only whole one is never removed before the next is."""
    save = TNTForCausalLM.save_pretrained

    def room_for_two(self, folder: Path, **options):
        if folder.parent.name == "checkpoints" and len(list(folder.parent.iterdir())) > (2 if keep == 2 else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder, **options)

    monkeypatch.setattr(TNTForCausalLM, "save_pretrained", room_for_two)
    assert main([*flags, "--output.keep-checkpoints", str(keep)]) == (0 if keep == 2 else 1)
    if keep == 1:
        assert "make room: the newest checkpoint stays until the next one is whole" in capsys.readouterr().err
        assert [p.name for p in (output_dir / "checkpoints").iterdir()] == ["stage1-00000002"]


# -------------------------------------------------------------------------------------------------------------- parts


def test_weight_decay_is_for_matrices_of_projections_only():
    model = TNTForCausalLM(TNTConfig.from_preset("tiny", use_momentum=True, use_forget_gate=True))
    decayed, others = (group["params"] for group in parameter_groups(model, 0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed) + len(others) == len(names) and not {map(id, decayed)} & {map(id, others)}
    kinds = {names[id(p)].split(".", 3)[-1] for p in decayed}
    assert kinds == {
        *(f"memory.{x}_proj.weight" for x in "qkvgo"), *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down"))
    }  # fmt: skip
    untied = TNTForCausalLM(TNTConfig.from_preset("tiny", tie_word_embeddings=False))
    assert any(p is untied.lm_head.weight for p in parameter_groups(untied, 0.1)[0]["params"])
    assert all(not isinstance(m, nn.Embedding) or m.weight is not p for m in untied.modules() for p in decayed)


@pytest.mark.slow
def test_bfloat16(flags, output_dir: Path, fresh_accelerator):
    """On a CPU too; the saved weights stay float32."""
    assert main([*flags, "--stages.stage1.steps", "2", "--training.mixed-precision", "bf16"]) == 0
    assert math.isfinite(_metrics(output_dir)["validation_bits_per_byte"]["after_stage2"])
    assert AutoModelForCausalLM.from_pretrained(output_dir / "stage1").dtype == torch.float32


@pytest.mark.slow
def test_compiled(flags, output_dir: Path, tmp_path: Path):
    """The same losses as without torch.compile, up to the order of float32 sums; names in checkpoints do not change."""
    short = [*flags, "--stages.stage1.steps", "2"]
    assert main(short) == 0
    assert main([*short, "--training.compile", "--output.dir", str(tmp_path / "compiled")]) == 0
    losses = [[r["loss_nats_per_token"] for r in _steps(d)] for d in (output_dir, tmp_path / "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    saved = [load_file(d / "stage2" / "model.safetensors").keys() for d in (output_dir, tmp_path / "compiled")]
    assert saved[0] == saved[1]


def test_a_sample_sends_no_commands_to_the_terminal():
    """An untrained model of bytes writes escape codes, too; letters of every script and line ends stay."""
    assert report._printable("\x1b[2Jé漢\tok\n\x07") == "\ufffd[2Jé漢\tok\n\ufffd"
