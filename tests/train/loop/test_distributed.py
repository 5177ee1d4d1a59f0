"""Processes with gloo on the CPU: DDP, FSDP2 and rows that are shared (context parallel) train what one process does,
and each resumes the others' runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, ParallelismConfig
from safetensors.torch import load_file
from torch import nn

from modeling_tnt import configuration
from modeling_tnt.train.cli import main
from modeling_tnt.train.data import RowOrder
from modeling_tnt.train.loop import trainer
from modeling_tnt.train.loop.batches import StepBatches
from modeling_tnt.train.loop.checkpoint import gather_optimizer, gather_weights, load_optimizer, read_state
from modeling_tnt.train.loop.distributed import Layout, context_mesh, find_layout, find_wrong_setup
from modeling_tnt.train.loop.report import read_log
from modeling_tnt.train.loop.run_folder import RunFolder

# Marked documents give the processes different numbers of predicted tokens.
RUN = ["--training.batch-size", "4", "--training.micro-batch-size", "1", "--data.boundaries", "marked",
       "--stages.stage2.share", "0.5", "--output.checkpoint-every", "1"]  # fmt: skip


@pytest.fixture
def one_process(flags, tmp_path: Path) -> Path:
    assert main([*flags, *RUN, "--output.dir", str(tmp_path / "one")]) == 0
    return tmp_path / "one"


def _launch(flags: list[str], processes: int = 2) -> subprocess.Popen:
    """`torchrun -m modeling_tnt.train`, which accelerate launch runs for several processes on one machine, too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, "-m", "modeling_tnt.train", *flags[1:], *RUN],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _start(flags: list[str]) -> list[subprocess.Popen]:
    """Two processes as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "modeling_tnt.train", *flags[1:], *RUN],
            env={**os.environ, **shared, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip


# Two processes with rows of their own, and four that share rows in pairs.
LAYOUTS = pytest.mark.parametrize(
    ("processes", "layout", "said"),
    [(2, [], "2 processes"), (4, ["--training.context-parallel", "2"], "4 processes, 2 to a row")],
    ids=["2", "2x2"],
)


def _steps(run: Path) -> list[dict]:
    return [r for r in read_log(run / "log.jsonl") if r["event"] == "step"]


def _assert_equal_within_float_error(run: Path, expected: Path) -> None:
    """Sums in another order differ by float32 rounding (1e-7), which AdamW's division lets grow over nine steps."""
    steps, wanted = _steps(run), _steps(expected)
    assert [(s["stage"], s["step"], s["tokens"]) for s in steps] == [
        (s["stage"], s["step"], s["tokens"]) for s in wanted
    ]
    for name in ("loss_nats_per_token", "gradient_norm"):
        assert [s[name] for s in steps] == pytest.approx([s[name] for s in wanted], rel=2e-5)
    health, wanted = ([r for r in read_log(x / "log.jsonl") if r["event"] == "memory_health"] for x in (run, expected))
    assert len(health) == len(wanted)
    for stage in ("stage1", "stage2"):
        weights, wanted = (load_file(r / stage / "model.safetensors") for r in (run, expected))
        assert weights.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(weights[name], wanted[name], rtol=0, atol=2e-4)
    names = ("after_stage1", "after_stage1_at_stage2_chunks", "after_stage2")
    scores, wanted = (
        {r["name"]: r for r in read_log(x / "log.jsonl") if r["event"] == "validation"} for x in (run, expected)
    )
    for value, tolerance in (("bits_per_byte", 1e-5), ("standard_error", 1e-4)):  # the latter is one of differences
        assert [scores[n][value] for n in names] == pytest.approx([wanted[n][value] for n in names], rel=tolerance)


def test_processes_that_share_their_rows_train_what_one_process_does(flags, one_process: Path, tmp_path: Path):
    launched = _launch([*flags, "--training.context-parallel", "2"])
    output, errors = launched.communicate(timeout=300)
    assert launched.returncode == 0, errors
    assert "2 processes, 2 to a row" in output
    _assert_equal_within_float_error(tmp_path / "run", one_process)


@pytest.mark.slow
@LAYOUTS
def test_ddp_goes_on_with_a_run_of_one_process(
    flags, one_process: Path, tmp_path: Path, monkeypatch, processes: int, layout: list[str], said: str
):
    take_step = trainer.Session.take_step

    def stop(self, *args):
        if self.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, *args)

    monkeypatch.setattr(trainer.Session, "take_step", stop)
    assert main([*flags, *RUN]) == 143
    resumed = _launch([*flags, *layout, "--resume"], processes)
    output, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert "stage1-00000002" in output and said in output
    _assert_equal_within_float_error(tmp_path / "run", one_process)


@pytest.mark.slow
@LAYOUTS
def test_one_process_goes_on_with_a_run_of_fsdp2(
    flags, one_process: Path, tmp_path: Path, capsys, processes: int, layout: list[str], said: str
):
    """Stopped by SIGTERM in stage 2, so that FSDP2 trains, validates, saves and swaps before."""
    sharded = _launch([*flags, *layout, "--training.sharding", "fsdp2"], processes)
    log = tmp_path / "run" / "log.jsonl"
    while sharded.poll() is None and not (log.exists() and '"stage": "stage2", "step": 1' in log.read_text()):
        time.sleep(0.02)
    sharded.send_signal(signal.SIGTERM)
    _, errors = sharded.communicate(timeout=300)
    assert "stopped in stage2" in errors, errors
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("stage2-*"))
    assert read_state(checkpoint)["state"]["step"] < 3
    assert main([*flags, *RUN, "--resume"]) == 0
    assert str(checkpoint) in capsys.readouterr().out
    _assert_equal_within_float_error(tmp_path / "run", one_process)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["--training.context-parallel", "2"]], ids=["ddp", "context"])
def test_a_process_that_is_killed_ends_the_run_with_what_is_left(flags, tmp_path: Path, layout: list[str]):
    """Started one by one: a launcher would end the others itself."""
    processes = _start([*flags, *layout, "--stages.stage1.steps", "1000"])
    log = tmp_path / "run" / "log.jsonl"
    while processes[0].poll() is None and not (log.exists() and '"step": 3' in log.read_text()):
        time.sleep(0.02)
    processes[1].kill()
    _, errors = processes[0].communicate(timeout=60)
    processes[1].communicate()
    assert processes[0].returncode == 1 and "Traceback" not in errors, errors
    assert "another process" in errors and "the first error of all processes is the cause" in errors
    assert "the last checkpoint is kept in " in errors


@pytest.mark.slow
def test_processes_in_a_folder_in_use_fail_together(flags, tmp_path: Path):
    with RunFolder(tmp_path / "run").hold():
        launched = _launch(flags)
        _, errors = launched.communicate(timeout=300)
    assert launched.returncode != 0
    assert errors.count("is in use: another process") == 2
    assert errors.count("Traceback") == 1, "the launcher's own, which says that they failed"


def test_processes_that_accelerate_does_not_see_are_refused(flags, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 1)
    assert main(flags) == 2
    assert "set the environment variable ACCELERATE_USE_CPU=true" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_fsdp2_of_one_process_is_refused(flags, capsys):
    assert main([*flags, "--training.sharding", "fsdp2"]) == 2
    assert "--training.sharding fsdp2 needs several processes" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ rows that are shared


def _accelerator(processes: int, index: int = 0, **sizes: int) -> SimpleNamespace:
    """What is asked of Accelerate; `sizes`: those of its ParallelismConfig, if it has one."""
    config = ParallelismConfig(**sizes) if sizes else None
    return SimpleNamespace(
        num_processes=processes, process_index=index, parallelism_config=config, distributed_type=DistributedType.FSDP,
        is_fsdp2=True,
    )  # fmt: skip


def test_neighbours_share_their_rows():
    """In the order of Accelerate's meshes, whose innermost dimension is cp; asked for in either place, or in both."""
    wanted = [Layout(3, index // 2, 2) for index in range(6)]
    configured = {"dp_shard_size": 3, "cp_size": 2}
    assert [find_layout(_accelerator(6, i), 2) for i in range(6)] == wanted
    assert [find_layout(_accelerator(6, i, **configured), None) for i in range(6)] == wanted
    assert [find_layout(_accelerator(6, i, **configured), 2) for i in range(6)] == wanted
    assert find_layout(_accelerator(6, 4), None) == Layout(6, 4, 1)
    assert find_layout(_accelerator(6, 4, dp_shard_size=6), None) == Layout(6, 4, 1)


def test_the_mesh_is_accelerates_where_it_has_one():
    accelerator = _accelerator(4, dp_shard_size=2, cp_size=2)
    accelerator.torch_device_mesh = {"cp": "those that share rows"}
    assert context_mesh(accelerator, find_layout(accelerator, None)) == "those that share rows"


@pytest.mark.parametrize("asked", [1, 4])
def test_a_recipe_and_accelerate_that_differ(asked: int):
    with pytest.raises(ValueError, match=f"context-parallel is {asked}, and accelerate's .* cp_size=2; give one of"):
        find_layout(_accelerator(4, dp_shard_size=2, cp_size=2), asked)


def test_what_else_accelerate_can_divide_is_refused():
    assert list(find_wrong_setup(_accelerator(4, dp_shard_size=2, cp_size=2), "none")) == []
    (problem,) = find_wrong_setup(_accelerator(4, dp_shard_size=2, tp_size=2), "none")
    assert "tp_size=2, which tnt train cannot use" in problem
    (problem,) = find_wrong_setup(_accelerator(8, dp_replicate_size=2, dp_shard_size=2, cp_size=2), "none")
    assert "dp_replicate_size=2" in problem and "use dp_replicate_size=1 and dp_shard_size=4" in problem


def test_a_number_of_processes_that_cannot_share_rows(flags, capsys):
    assert main([*flags, "--training.context-parallel", "2"]) == 2
    message = capsys.readouterr().err
    assert "--training.context-parallel 2 must divide the number of processes, 1; start 2 with accelerate" in message


def test_what_processes_that_share_rows_cannot_do(flags, monkeypatch, capsys):
    """The batch is shared out among groups, of which there are two."""
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 4)
    more = ["--training.compile", "--training.batch-size", "3", "--training.context-parallel", "2"]
    assert main([*flags, *more]) == 2
    message = capsys.readouterr().err
    assert "--training.context-parallel 2 excludes --training.compile: a compiled graph cannot wait" in message
    assert "must be a multiple of the number of groups of 2 processes, 2; use 4" in message
    more = ["--model.architecture", "llama", "--training.batch-size", "4", "--training.context-parallel", "4"]
    assert main([*flags, *more]) == 2
    assert "--training.context-parallel 4 needs memories" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ rows and states


@pytest.mark.parametrize(("processes", "micro"), [(1, 6), (1, 2), (2, 3), (2, 1), (3, 2)])
def test_a_step_reads_the_same_rows_whatever_the_processes(processes: int, micro: int):
    def order() -> RowOrder:
        return RowOrder(16 * 100, seq_len=16, block_len=16, seed=0, num_rows=18)

    expected = list(order())
    read: list[list[int]] = [[], [], []]
    for process in range(processes):
        batches = StepBatches(order(), batch_size=6, micro_batch_size=micro, layout=Layout(processes, process))
        found = list(batches)
        assert len(found) == len(batches) == 18 // (micro * processes)
        per_step = len(found) // 3
        for i, batch in enumerate(found):
            read[i // per_step] += batch
    assert [sorted(step) for step in read] == [sorted(expected[6 * i : 6 * i + 6]) for i in range(3)]


def test_tied_weights_are_gathered_once():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    weights = gather_weights(model)
    assert weights["embed.weight"] is weights["head.weight"]


def test_the_optimizers_state_keeps_its_names_and_its_numbers():
    """The names are those of the files of every earlier version. Rates and decays are the new optimizer's own."""
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW([{"params": [*m.parameters()], "weight_decay": 0.1}], lr=0.1) for m in models]

    def step(which: int) -> None:
        models[which](torch.ones(3)).square().sum().backward()
        optimizers[which].step()
        optimizers[which].zero_grad()

    step(0)
    saved = {name: tensor.clone() for name, tensor in gather_optimizer(models[0], optimizers[0]).items()}
    assert saved.keys() == {f"optimizer/{p}/{e}" for p in ("weight", "bias") for e in ("step", "exp_avg", "exp_avg_sq")}
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].param_groups[0]["lr"] = 0.2
    load_optimizer(models[1], optimizers[1], saved)
    assert torch.equal(models[1].weight, models[0].weight), "loading takes no step"
    assert optimizers[1].param_groups[0]["lr"] == 0.2
    optimizers[0].param_groups[0]["lr"] = 0.2
    for which in (0, 1):
        step(which)
    assert torch.equal(models[1].weight, models[0].weight) and torch.equal(models[1].bias, models[0].bias)


def test_the_state_of_another_optimizer_is_refused():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="an entry for other, which is no parameter"):
        load_optimizer(model, optimizer, {"optimizer/other/exp_avg": torch.zeros(2)})
    with pytest.raises(ValueError, match="lacks 1 parameters that are trained, e.g. bias"):
        load_optimizer(model, optimizer, {"optimizer/weight/exp_avg": torch.zeros(2, 2)})


@pytest.mark.parametrize("path", sorted((Path(configuration.__file__).parent / "accelerate").glob("*.yaml")))
def test_shipped_accelerate_configurations_are_read_by_accelerate(path: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes > 1 and config.mixed_precision == "no"
    assert f"configuration/accelerate/{path.name}" in path.read_text() or "torchrun" in path.read_text()
