"""What other libraries look up by name: label smoothing, default LoRA modules, and which weights decay."""

import importlib
import importlib.util
import subprocess
import sys

import pytest
import torch
from model_cases import VARIANTS, make_model, make_tokens
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from modeling_tnt import TNTForCausalLM, registration
from modeling_tnt.registration import _AfterImport, decaying_parameters

peft = pytest.importorskip("peft", reason="PEFT is not installed: the extra dev")

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
LLAMA = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "attention_bias": True,
}  # fmt: skip


def decayed(model: nn.Module) -> set[str]:
    """The names that transformers' Trainer lets decay."""
    return set(Trainer.get_decay_parameter_names(None, model))


def adapt(config: peft.PeftConfig, model: nn.Module | None = None) -> peft.PeftModel:
    return peft.get_peft_model(model or make_model(dtype=torch.float32), config)


# -------------------------------------------------------------------------------------------------- what may have moved


@pytest.mark.parametrize(
    "name",
    [
        "transformers.models.auto.modeling_auto:MODEL_MAPPING_NAMES",
        "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "transformers.models.auto.modeling_auto:MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "transformers.trainer:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "peft.utils.constants:TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "peft.utils.constants:TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    ],
)
def test_tables_by_name_are_where_they_were_and_know_the_model(name):
    module, _, table = name.partition(":")
    entries = getattr(importlib.import_module(module), table, None)
    assert isinstance(entries, dict), f"{name} has moved: it is no table any more"
    assert "tnt" in entries, f"{name} has no entry of ours"


def test_trainer_asks_for_names_of_parameters_where_it_did():
    assert hasattr(Trainer.get_decay_parameter_names, registration._MARK), "Trainer.get_decay_parameter_names has moved"
    inside = Trainer.create_optimizer.__code__.co_names
    assert "get_decay_parameter_names" in inside, "Trainer.create_optimizer no longer calls get_decay_parameter_names"


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("adapted", [False, True])
def test_label_smoothing_by_next_to_nothing_gives_the_loss_of_none(adapted, tmp_path):
    model = make_model(dtype=torch.float32)
    if adapted:
        model = adapt(peft.LoraConfig(task_type="CAUSAL_LM"), model)
    tokens = make_tokens(2, 12)
    losses = []
    for smoothing in (0.0, 1e-6):
        arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], label_smoothing_factor=smoothing)
        trainer = Trainer(model=model, args=arguments)
        losses.append(trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens.clone()}).item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_trainer_lets_matrices_of_projections_decay_and_nothing_else(variant, tmp_path):
    model = make_model(variant, dtype=torch.float32)
    trainer = Trainer(model=model, args=TrainingArguments(tmp_path, weight_decay=0.1, use_cpu=True, report_to=[]))
    groups = trainer.create_optimizer().param_groups
    ids = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in ids}
    parameters = {name for name, _ in model.named_parameters()}
    expected = {name for name in parameters if name.removesuffix(".weight").split(".")[-1] in PROJECTIONS}
    assert names == expected - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    assert ids == decaying_parameters(model)  # as `tnt train` does


def test_models_of_others_are_as_they_were_also_beside_ours():
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA))
    original = set(Trainer.get_decay_parameter_names.__wrapped__(None, llama))
    assert decayed(llama) == original and "model.embed_tokens.weight" in original
    both = nn.ModuleDict({"ours": make_model(dtype=torch.float32), "theirs": llama})
    assert {name for name in decayed(both) if name.startswith("theirs.")} == {f"theirs.{name}" for name in original}
    assert "ours.model.embed_tokens.weight" not in decayed(both)


def test_tnt_train_lets_the_matrices_of_a_llama_decay():
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA))
    names = {name for name, p in llama.named_parameters() if id(p) in decaying_parameters(llama)}
    assert names == {f"{name}.weight" for name, module in llama.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(
    "options, expected",
    [
        # Low-rank factors of projections decay as in any other model; those of a gate no more than the gate.
        ({"target_modules": ["q_proj", "lr_gate"]}, {"q_proj.lora_A", "q_proj.lora_B"}),
        ({"target_modules": ["q_proj"], "modules_to_save": ["local_memories.0"]}, {"q_proj.lora_A", "q_proj.lora_B"}),
        ({"target_modules": ["embed_tokens"]}, set()),
        ({"target_modules": ["o_proj"], "trainable_token_indices": [1, 2]}, {"o_proj.lora_A", "o_proj.lora_B"}),
    ],
)
def test_adapters_decay_as_what_they_adapt(options, expected):
    model = adapt(peft.LoraConfig(task_type="CAUSAL_LM", **options))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    found = {".".join(name.split(".")[-4:-2]) for name in decayed(model) & trainable}
    assert found == expected and len(trainable) > 2 * len(expected)


# ------------------------------------------------------------------------------------------------- defaults of adapters


@pytest.mark.parametrize(
    "method, modules",
    [
        ("LoraConfig", {"q_proj", "v_proj"}),
        ("VeraConfig", {"q_proj", "v_proj"}),
        ("LoHaConfig", {"q_proj", "v_proj"}),
        ("IA3Config", {"k_proj", "v_proj", "down_proj"}),
        ("LNTuningConfig", {"input_norm", "mlp_norm", "norm"}),
    ],
)
@pytest.mark.parametrize("variant", ["mlp", "hybrid-full", "titans-mag"])
def test_default_modules_of_peft(method, modules, variant):
    model = adapt(getattr(peft, method)(task_type="CAUSAL_LM"), make_model(variant, torch.float32))
    adapted = {name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(".base_layer")}
    assert {name.rpartition(".")[2] for name in adapted} == modules
    if "q_proj" in modules:  # of attention, too
        assert any(".self_attn." in name for name in adapted) == (variant != "mlp")
    model(make_tokens(2, 9), labels=make_tokens(2, 9)).loss.backward()


# -------------------------------------------------------------------------------------------------- when it is imported

MODEL_FIRST = """
import sys
import modeling_tnt
assert not {{"transformers.trainer", "peft"}} & sys.modules.keys(), "these are slow to import"
from transformers import Trainer
from transformers.trainer import __loader__ as loader
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as modules
assert hasattr(Trainer.get_decay_parameter_names, {mark!r}) and modules["tnt"] == ["q_proj", "v_proj"]
assert type(loader).__name__ == "SourceFileLoader"
assert not any(type(finder).__name__ == "_AfterImport" for finder in sys.meta_path)
"""


@pytest.mark.slow
def test_the_model_before_the_trainer():
    """In a process of its own, where neither has been imported."""
    code = MODEL_FIRST.format(mark=registration._MARK)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def import_copy():
    """As a checkpoint brings a copy of the code beside the package."""
    spec = importlib.util.spec_from_file_location("tnt_registration_copy", registration.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_trainer_before_the_model(monkeypatch):
    monkeypatch.setattr(Trainer, "get_decay_parameter_names", Trainer.get_decay_parameter_names.__wrapped__)
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.delitem(table, "tnt")
    import_copy()
    assert hasattr(Trainer.get_decay_parameter_names, registration._MARK) and table["tnt"] == ["q_proj", "v_proj"]


def test_a_second_copy_of_the_code_changes_nothing():
    before = Trainer.get_decay_parameter_names
    import_copy()
    assert Trainer.get_decay_parameter_names is before


@pytest.fixture
def late(tmp_path, monkeypatch):
    """A module that nobody has imported, and that fails as often as its file says."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    (tmp_path / "late_module.py").write_text("VALUE = 1\n")
    yield tmp_path / "late_module.py"
    sys.modules.pop("late_module", None)


def test_the_hook_is_called_once_behind_the_import_and_is_gone(late):
    before, seen = list(sys.meta_path), []
    for _ in range(2):  # two copies of the code
        _AfterImport("late_module", lambda module: seen.append(module.VALUE)).install()
    assert importlib.util.find_spec("late_module").loader.get_source("late_module") == "VALUE = 1\n"
    assert importlib.util.find_spec("no_such_module") is None
    module = importlib.import_module("late_module")
    assert seen == [1, 1] and sys.meta_path == before
    assert module.__loader__ is module.__spec__.loader and type(module.__loader__).__name__ == "SourceFileLoader"


def test_an_import_that_fails_keeps_the_hook_for_the_next(late):
    seen = []
    _AfterImport("late_module", lambda module: seen.append(module.VALUE)).install()
    late.write_text("raise ImportError('not yet')\n")
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module("late_module")
    late.write_text("VALUE = 23\n")
    importlib.import_module("late_module")
    assert seen == [23]


def test_what_has_moved_is_named_and_stops_no_import(late, caplog, monkeypatch):
    monkeypatch.setattr(registration.logger, "propagate", True)
    _AfterImport("late_module", registration._wrap_trainer).install()
    assert importlib.import_module("late_module").VALUE == 1
    assert "late_module" in caplog.text and "'Trainer'" in caplog.text


def test_models_that_are_made_from_a_copy_count_too():
    """A checkpoint's own classes are not the package's: what counts is the method."""
    copy = type("TNTForCausalLM", (nn.Module,), {"set_local_chunks": TNTForCausalLM.set_local_chunks})()
    copy.w1 = nn.Parameter(torch.ones(2))
    assert decayed(copy) == set()
