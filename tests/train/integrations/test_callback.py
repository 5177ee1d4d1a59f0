"""Stage 2 under transformers' Trainer: when the chunks are swapped, what is saved, and how a run resumes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train import TwoStageCallback, load_lora, lora_config
from modeling_tnt.train.integrations.lora import find_tnt_model

STEPS = 6


def make_model() -> TNTForCausalLM:
    torch.manual_seed(0)
    config = TNTConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_heads=1, head_dim=16, intermediate_size=16,
        global_chunk_size=16, local_chunk_sizes=[8], local_shard_lengths=16, initializer_range=0.2,
    )  # fmt: skip
    return TNTForCausalLM(config)


class Recorder(TrainerCallback):
    """The local chunks that each step, and each evaluation, was run with."""

    def __init__(self):
        self.steps, self.evaluations = {}, {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps[state.global_step] = find_chunks(model)

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.evaluations[state.global_step] = find_chunks(model)


def find_chunks(model) -> list[int]:
    return next(m.config for m in model.modules() if hasattr(m, "config")).local_chunk_sizes


def make_trainer(folder, callback, model=None, **arguments) -> Trainer:
    """Six steps of two rows, logged and saved at each step."""
    tokens = torch.randint(0, 32, (3 * STEPS, 32), generator=torch.Generator().manual_seed(0))
    given = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return Trainer(
        model=make_model() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **given | arguments),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        eval_dataset=[{"input_ids": row, "labels": row} for row in tokens[:2]],
        callbacks=[*([callback] if isinstance(callback, TrainerCallback) else callback or []), Recorder()],
    )


def recorded(trainer) -> Recorder:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Recorder))


def losses(trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def saved_chunks(folder, name="config.json") -> list[list[int]]:
    files = [folder / f"checkpoint-{step}" / name for step in range(1, STEPS + 1)]
    return [json.loads(file.read_text())["local_chunk_sizes"] for file in files]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run with the swap after step 3: its trainer and its folder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = make_trainer(folder, TwoStageCallback([1], [4], step=3))
    trainer.train()
    return trainer, folder


def test_chunks_are_swapped_logged_and_saved(uninterrupted, tmp_path, capsys):
    trainer, folder = uninterrupted
    assert recorded(trainer).steps == {1: [8], 2: [8], 3: [8], 4: [1], 5: [1], 6: [1]}
    assert saved_chunks(folder) == [[8]] * 3 + [[1]] * 3, "the checkpoint of the swap's step is the end of stage 1"
    loaded = TNTForCausalLM.from_pretrained(folder / "checkpoint-6")
    assert (loaded.config.local_chunk_sizes, loaded.config.shard_lengths) == ([1], [4])
    events = [entry for entry in trainer.state.log_history if "stage" in entry]
    assert events == [{"stage": 2, "local_chunk_sizes": [1], "local_shard_lengths": [4], "step": 3}]
    make_trainer(tmp_path, TwoStageCallback([2], share=0.5), save_strategy="no").train()
    assert "step 3: stage 2 begins; local chunks [2], shard lengths 16" in capsys.readouterr().out


def test_the_swap_changes_the_losses_from_its_step_on(uninterrupted, tmp_path):
    """Up to it the run is the plain one; after it, it is what a plain run from that checkpoint at those chunks is."""
    plain = make_trainer(tmp_path / "plain", None, save_strategy="no")
    plain.train()
    ours, theirs = losses(uninterrupted[0]), losses(plain)
    assert [ours[step] == theirs[step] for step in range(1, STEPS + 1)] == [True] * 3 + [False] * 3
    shutil.copytree(uninterrupted[1] / "checkpoint-3", tmp_path / "checkpoint-3")
    swapped = make_model()
    swapped.set_local_chunks([1], [4])
    resumed = make_trainer(tmp_path, None, swapped, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed)[4] == ours[4]


@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.parametrize("model_from", ["stage 1", "last checkpoint"])
def test_a_resumed_run_equals_the_uninterrupted_one(uninterrupted, tmp_path, step, model_from):
    """Before the swap, at it and after it, whichever chunks the model object comes with; to the last bit."""
    trainer, folder = uninterrupted
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    last = folder / "checkpoint-6"
    model = make_model() if model_from == "stage 1" else TNTForCausalLM.from_pretrained(last)
    resumed = make_trainer(tmp_path, TwoStageCallback([1], [4], step=3), model)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert losses(resumed) == losses(trainer)
    assert [e for e in resumed.state.log_history if "stage" in e] == [
        e for e in trainer.state.log_history if "stage" in e
    ]
    assert {s: c for s, c in recorded(trainer).steps.items() if s > step} == recorded(resumed).steps
    expected, got = (load_file(f / "checkpoint-6" / "model.safetensors") for f in (folder, tmp_path))
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    assert (tmp_path / "checkpoint-6" / "config.json").read_text() == (last / "config.json").read_text()


def test_callback_state_may_be_restored_by_the_trainer(uninterrupted, tmp_path):
    """restore_callback_states_from_checkpoint replaces the callback by one with the checkpoint's arguments."""
    shutil.copytree(uninterrupted[1] / "checkpoint-2", tmp_path / "checkpoint-2")
    options = {"restore_callback_states_from_checkpoint": True, "save_strategy": "no"}
    resumed = make_trainer(tmp_path, TwoStageCallback([2], step=5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(uninterrupted[0])


def test_it_may_join_a_run_that_began_without_it(tmp_path):
    make_trainer(tmp_path, None, max_steps=2).train()
    resumed = make_trainer(tmp_path, TwoStageCallback([1], step=4))
    resumed.train(resume_from_checkpoint=True)
    assert recorded(resumed).steps == {3: [8], 4: [8], 5: [1], 6: [1]}
    assert saved_chunks(tmp_path) == [[8]] * 4 + [[1]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("share", "first"), [(0.0, 1), (0.5, 4), (0.8, 6), (0.99, 6)])
def test_share_of_the_steps(tmp_path, share, first):
    """Of the steps that epochs amount to, too: 18 rows, 3 at a time. The last step is always one of stage 2."""
    options = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 3, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, TwoStageCallback([2], share=share), **options)
    trainer.train()
    assert recorded(trainer).steps == {step: [8] if step < first else [2] for step in range(1, 7)}


def test_gradient_accumulation_swaps_between_optimizer_steps(tmp_path):
    seen = []
    model = make_model()
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(find_chunks(module)), with_kwargs=True)
    options = {"gradient_accumulation_steps": 3, "max_steps": 2, "save_strategy": "no"}
    make_trainer(tmp_path, TwoStageCallback([2], step=1), model, **options).train()
    assert seen == [[8]] * 3 + [[2]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("best_step", [3, 5])
def test_the_best_model_is_loaded_with_its_chunks(tmp_path, best_step):
    """Evaluated at the swap's step with the chunks of stage 1."""
    options = {
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "score",
        "greater_is_better": True,
    }  # fmt: skip
    trainer = make_trainer(tmp_path, TwoStageCallback([1], step=3), **options)
    scores = iter(range(1, STEPS + 1))
    trainer.compute_metrics = lambda _: {"score": float(next(scores) == best_step)}
    trainer.train()
    best = tmp_path / f"checkpoint-{best_step}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert recorded(trainer).evaluations == {1: [8], 2: [8], 3: [8], 4: [1], 5: [1], 6: [1]}
    expected = TNTForCausalLM.from_pretrained(best)
    assert (
        trainer.model.config.local_chunk_sizes == expected.config.local_chunk_sizes == ([8] if best_step == 3 else [1])
    )
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(tokens).logits, expected(tokens).logits)


def test_training_again_begins_with_stage_1_again(tmp_path):
    """As after an attempt that Trainer gave up, with auto_find_batch_size or by hand."""
    trainer = make_trainer(tmp_path, TwoStageCallback([1], step=3), save_strategy="no")
    for _ in range(2):
        trainer.train()
        assert recorded(trainer).steps == {1: [8], 2: [8], 3: [8], 4: [1], 5: [1], 6: [1]}


@pytest.mark.slow
def test_compiled_by_the_trainer(tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = make_trainer(tmp_path, TwoStageCallback([2], step=1), max_steps=2, **options)
    trainer.train()
    assert trainer.state.log_history[1]["stage"] == 2
    assert json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())["local_chunk_sizes"] == [2]


def test_the_model_is_found_inside_of_wrappers(tmp_path):
    model = make_model()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for wrapped in (model, torch.compile(model), torch.nn.DataParallel(model), parallel, torch.compile(parallel)):
            assert find_tnt_model(wrapped) is model, "with its head, and not the base model in it"
        sharded = make_model()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        find_tnt_model(sharded).set_local_chunks([2])
        sharded(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
        assert sharded.config.local_chunk_sizes == [2] and type(sharded) is not TNTForCausalLM
    finally:
        torch.distributed.destroy_process_group()
    base = model.model
    assert find_tnt_model(torch.nn.Sequential(base)) is base


@pytest.mark.slow
def test_with_peft(tmp_path):
    """Adapters have no config of their own: the callback saves the one that they were trained with."""
    make_model().save_pretrained(tmp_path / "base")

    def adapted():
        base = TNTForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        return peft.get_peft_model(base, lora_config(base, r=2))

    trainer = make_trainer(tmp_path, TwoStageCallback([1], step=3), adapted())
    trainer.train()
    assert recorded(trainer).steps == {1: [8], 2: [8], 3: [8], 4: [1], 5: [1], 6: [1]}
    assert saved_chunks(tmp_path, "base_config.json") == [[8]] * 3 + [[1]] * 3
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        loaded = load_lora(tmp_path / "checkpoint-6")
        assert torch.equal(loaded(tokens).logits, trainer.model.eval()(tokens).logits)
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = make_trainer(tmp_path / "resumed", TwoStageCallback([1], step=3), adapted(), save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(trainer)
    assert all(torch.equal(p, weights(trainer.model)[name]) for name, p in weights(resumed.model).items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_sizes": [], "step": 1}, r"chunk_sizes must be a list with one int for each local memory, got \[\]"),
        ({"chunk_sizes": 1, "step": 1}, r"chunk_sizes must be a list .*, got 1; use e.g. \[1\]"),
        ({"chunk_sizes": [0], "step": 1}, r"chunk_sizes\[0\] must be an int of at least 1, got 0"),
        ({"chunk_sizes": [1]}, "give exactly one of step and share, got step=None and share=None"),
        ({"chunk_sizes": [1], "step": 1, "share": 0.5}, "give exactly one of step and share"),
        ({"chunk_sizes": [1], "step": 0.5}, "step must be an int of at least 0, got 0.5; use share"),
        ({"chunk_sizes": [1], "step": -1}, "step must be an int of at least 0, got -1"),
        ({"chunk_sizes": [1], "share": 1.0}, "share must be a number with 0 ≤ share < 1, got 1.0"),
    ],
)
def test_arguments_that_fit_no_run(arguments, message):
    with pytest.raises(ValueError, match=message):
        TwoStageCallback(**arguments)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (TwoStageCallback([3], step=1), r"local_chunk_sizes\[0\]=3 must divide local_shard_lengths=16"),
        (TwoStageCallback([1, 1], step=1), r"one entry for each of the model's 1 local memories"),
        (TwoStageCallback([1], step=6), "step=6 must be below the run's 6 steps, or stage 2 never begins"),
        (TwoStageCallback([8], step=1), r"chunk_sizes=\[8\] must differ from the model's own"),
        ([TwoStageCallback([1], step=1), TwoStageCallback([2], step=2)], "must hold one TwoStageCallback, got several"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_before_its_first_step(tmp_path, callback, message):
    trainer = make_trainer(tmp_path, callback)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0 and not trainer.state.log_history
    assert trainer.model.config.local_chunk_sizes == [8]


def test_a_model_without_memories_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 16}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    with pytest.raises(
        TypeError, match="must be a TNT model, such as TNTForCausalLM, or wrap one; got LlamaForCausalLM"
    ):
        make_trainer(tmp_path, TwoStageCallback([1], step=1), llama).train()


def test_a_checkpoint_that_was_swapped_elsewhere_is_refused(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[1] / "checkpoint-4", tmp_path / "checkpoint-4")
    resumed = make_trainer(tmp_path, TwoStageCallback([1], [4], share=0.5), max_steps=12)
    with pytest.raises(ValueError, match="swaps the chunks after step 3, this one does after step 6; use step=3"):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_the_package_loads_the_trainer_only_when_asked():
    code = (
        "import sys, modeling_tnt.train as t\n"
        "assert 'transformers.trainer' not in sys.modules and 'peft' not in sys.modules\n"
        "home = t.TwoStageCallback.__module__\n"
        "assert home == 'modeling_tnt.train.integrations.callback' and 'lora_config' in dir(t)\n"
        "try: t.TwoStageCalback\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "module 'modeling_tnt.train' has no attribute 'TwoStageCalback'", done.stderr
