"""`tnt train` from the command line to the files it leaves, and what stops it."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train import trainer
from modeling_tnt.train.arguments import TrainArguments
from modeling_tnt.train.cli import main
from modeling_tnt.train.data import pack, read_corpus, split_documents
from modeling_tnt.train.evaluate import bits_per_byte
from modeling_tnt.train.plan import plan_stages
from modeling_tnt.train.report import read_log
from modeling_tnt.train.trainer import learning_rate_factor, parameter_groups


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def _metrics(output_dir: Path) -> dict:
    return json.loads((output_dir / "metrics.json").read_text())


def test_a_run_from_the_command_line(flags, text_folder: Path, output_dir: Path, capsys):
    assert main(flags) == 0
    metrics, scores = _metrics(output_dir), _metrics(output_dir)["validation_bits_per_byte"]

    assert list(scores) == ["byte_bigram", "after_stage1", "after_stage1_at_stage2_chunks", "after_stage2"]
    assert all(0 < score < 9 for score in scores.values())
    assert scores["after_stage1"] != scores["after_stage1_at_stage2_chunks"] != scores["after_stage2"]
    printed = capsys.readouterr().out
    assert all(f"{score:.3f}" in printed for score in scores.values())
    assert metrics["sample"]["continuation"] and metrics["sample"]["prompt"] in printed
    assert [(s["steps"], s["local_chunk_sizes"]) for s in metrics["stages"]] == [(6, [8]), (1, [2])]
    assert (output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["sample"]["prompt"] in (output_dir / "sample.txt").read_text()
    assert not [p for p in output_dir.rglob("*") if p.name.startswith(".")]

    log = read_log(output_dir / "log.jsonl")
    steps = [r for r in log if r["event"] == "step"]
    assert [r["tokens"] for r in steps] == [128 * i for i in range(1, 8)]
    health = [r for r in log if r["event"] == "memory_health"]
    assert [(r["stage"], r["step"]) for r in health] == [("stage1", 3), ("stage1", 6), ("stage2", 1)]
    assert all(r[f"layer0/{m}/{q}"] > 0 for r in health for m in ("global", "local0") for q in _HEALTH)

    # What was saved gives the figures that were printed: same weights, same chunks, same rows, one batch size.
    corpus = read_corpus([str(text_folder)], data_config=None, text_column="text", limit_bytes=10**9)
    for name, key in (("stage1", "after_stage1"), ("stage2", "after_stage2")):
        model = AutoModelForCausalLM.from_pretrained(output_dir / name)
        tokenizer = AutoTokenizer.from_pretrained(output_dir / name)
        rows = pack(split_documents(corpus.documents, 0.2).validation, tokenizer).rows(64)
        rows = type(rows)(*(x[: metrics["validation_tokens"] // 64] for x in rows))
        assert bits_per_byte(model, rows, batch_size=2) == scores[key]
    assert model.config.local_chunk_sizes == [2]
    state = json.loads((output_dir / "stage2" / "trainer_state.json").read_text())
    assert state["stage"] == "stage2" and state["step"] == 1 and state["rows"] == 14


_HEALTH = ("inner_grad_norm", "state_norm", "step_size")


def test_equal_seeds_give_equal_runs(flags, output_dir: Path, tmp_path: Path):
    runs = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main([*flags, "--output-dir", str(tmp_path / name), "--seed", seed, "--max-steps", "3"]) == 0
        losses = [r["loss_nats_per_token"] for r in read_log(tmp_path / name / "log.jsonl") if r["event"] == "step"]
        runs.append(
            (losses, _metrics(tmp_path / name)["sample"], _metrics(tmp_path / name)["validation_bits_per_byte"])
        )
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0]


def test_training_learns(flags, output_dir: Path):
    """60 steps halve the bits of an untrained model (8.6); a text of 16 words has few bits per byte."""
    assert main([*flags, "--max-steps", "60", "--learning-rate", "0.01", "--checkpoint-every", "50"]) == 0
    assert _metrics(output_dir)["validation_bits_per_byte"]["after_stage1"] < 4.3


def test_one_stage(flags, output_dir: Path):
    assert main([*flags, "--stage2-share", "0", "--max-steps", "2"]) == 0
    assert list(_metrics(output_dir)["validation_bits_per_byte"]) == ["byte_bigram", "after_stage1"]
    assert not (output_dir / "stage2").exists()


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
    assert f"the last good checkpoint, of step 4, is kept in {output_dir / 'stage1'}" in message
    assert "Traceback" not in message
    model = AutoModelForCausalLM.from_pretrained(output_dir / "stage1")
    assert all(p.isfinite().all() for p in model.parameters())
    assert json.loads((output_dir / "stage1" / "trainer_state.json").read_text())["step"] == 4


def test_ctrl_c_keeps_the_last_checkpoint(flags, output_dir: Path, monkeypatch, capsys):
    health = trainer.memory_health

    def interrupt_second(*args):
        if (output_dir / "stage1").exists():
            raise KeyboardInterrupt
        return health(*args)

    monkeypatch.setattr(trainer, "memory_health", interrupt_second)
    assert main(flags) == 130
    assert "interrupted in stage1 at step 3; the last good checkpoint, of step 2, is kept" in capsys.readouterr().err
    AutoModelForCausalLM.from_pretrained(output_dir / "stage1")


def test_a_full_disk_keeps_the_last_checkpoint(flags, output_dir: Path, monkeypatch, capsys):
    save = TNTForCausalLM.save_pretrained

    def full_at_second(self, folder: Path):
        if (output_dir / "stage1").exists():
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(TNTForCausalLM, "save_pretrained", full_at_second)
    assert main(flags) == 1
    assert "No space left on device" in (message := capsys.readouterr().err) and "is kept" in message
    assert json.loads((output_dir / "stage1" / "trainer_state.json").read_text())["step"] == 2
    AutoModelForCausalLM.from_pretrained(output_dir / "stage1")


# ---------------------------------------------------------------------------------------------------------- bad input


def test_all_problems_of_the_arguments_at_once(flags, tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    more = ["--max-steps", "0", "--learning-rate", "-1", "--output-dir", str(tmp_path / "file"), "--preset", "tnt-1b"]
    assert main([*flags, *more]) == 2
    message = capsys.readouterr().err
    assert "--max-steps must be at least 1, got 0" in message
    assert "--learning-rate must be positive and finite, got -1.0" in message
    assert f"{tmp_path / 'file'} is a file; give another folder" in message
    assert "'tnt-1b' does not exist; use one of tiny, titans-150m, tnt-150m" in message


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--stage2-chunk-sizes", "3"], "local_chunk_sizes[0]=3 must divide local_shard_lengths=32; use 2 or 4"),
        (["--stage2-chunk-sizes", "4", "2"], "has 2 entries; give one for each of the 1 local memories"),
        (["--override", "vocab_size=300"], "has 384 tokens, more than vocab_size=300"),
        (["--override", "num_head=3"], "did you mean num_heads?"),
        (["--override", "num_heads"], "--override takes field=JSON, got 'num_heads'"),
        (["--override", "local_chunk_sizes=[]"], "no local memory to swap chunks of; use --stage2-share 0"),
        (["--tokenizer", "./nothing-here"], "--tokenizer ./nothing-here could not be loaded"),
        (["--seq-len", "9000"], "the training side of the data has"),
        (["--seq-len", "3000"], "the validation side of the data has"),
        (["--data", "missing.txt"], "missing.txt' does not exist"),
        (["--mixed-precision", "fp8"], "--mixed-precision must be no or bf16, got 'fp8'"),
        (["--validation-share", "1"], "must lie between 0 and 1, both excluded"),
    ],
)
def test_bad_arguments(flags, output_dir: Path, capsys, more: list[str], says: str):
    assert main([*flags, *more]) == 2
    message = capsys.readouterr().err
    assert says in message and "Traceback" not in message
    assert not output_dir.exists()


def test_an_unknown_flag_suggests_a_known_one(flags, capsys):
    for typo, known in (("--max-step", "--max-steps"), ("--lerning-rate=3", "--learning-rate")):
        with pytest.raises(SystemExit) as stop:
            main([*flags, typo])
        assert stop.value.code == 2
        assert f"did you mean {known}?" in capsys.readouterr().err


def test_another_run_is_not_replaced_unasked(flags, output_dir: Path, capsys):
    short = [*flags, "--max-steps", "1"]
    assert main(short) == 0
    (output_dir / "mine.txt").write_text("not the trainer's")
    before = (output_dir / "metrics.json").read_text()
    assert main(short) == 2
    assert "holds another run; give another folder, or --overwrite" in capsys.readouterr().err
    assert (output_dir / "metrics.json").read_text() == before
    assert main([*short, "--overwrite", "--seed", "5"]) == 0
    assert (output_dir / "metrics.json").read_text() != before and (output_dir / "mine.txt").exists()


def test_a_string_where_a_list_belongs():
    with pytest.raises(TypeError, match=r"data must be a list, got str; use \['a.txt'\]"):
        TrainArguments(data="a.txt")


# -------------------------------------------------------------------------------------------------------------- parts


def test_stages():
    config = TNTConfig.from_preset("tiny", local_chunk_sizes=[64, 6, 2, 1], local_shard_lengths=192)
    first, second = plan_stages(TrainArguments(max_steps=200), config)
    assert (first.steps, first.local_chunk_sizes) == (200, [64, 6, 2, 1])
    assert (second.steps, second.local_chunk_sizes) == (10, [16, 1, 1, 1])
    assert plan_stages(TrainArguments(max_steps=1), config)[1].steps == 1


def test_learning_rate():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)
    assert learning_rate_factor(0, 1, 0.1) == 1.0


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


def test_bfloat16(flags, output_dir: Path):
    """On a CPU too; the saved weights stay float32."""
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert main([*flags, "--max-steps", "2", "--mixed-precision", "bf16"]) == 0
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert math.isfinite(_metrics(output_dir)["validation_bits_per_byte"]["after_stage2"])
    assert AutoModelForCausalLM.from_pretrained(output_dir / "stage1").dtype == torch.float32
