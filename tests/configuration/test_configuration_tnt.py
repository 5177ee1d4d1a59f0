"""TNTConfig: defaults, saving and loading, and every message of the validation."""

import json
import re

import pytest
from transformers import AutoConfig, PreTrainedConfig

from modeling_tnt.configuration import TNTConfig, available_presets, validation
from modeling_tnt.configuration.validation import divisors
from modeling_tnt.configuration.version import VERSION

PRESETS = [
    "tiny", "tiny-hybrid", "tiny-mac", "tiny-mag", "tiny-mal", "titans-150m", "titans-mac-150m", "titans-mag-150m",
    "titans-mal-150m", "tnt-150m", "tnt-hybrid-150m", "ttt-linear-125m", "ttt-mlp-125m",
]  # fmt: skip


def problems_of(**changes) -> list[str]:
    """The numbered lines of the error that a config with these fields raises."""
    with pytest.raises(ValueError) as caught:
        TNTConfig(**changes)
    return [line.split(". ", 1)[1] for line in str(caught.value).splitlines()[1:]]


def test_derived_defaults_are_stored():
    config = TNTConfig(hidden_size=768, num_heads=12)
    assert config.head_dim == 64
    assert config.intermediate_size == 2048
    assert config.memory_expansion == 2
    assert (config.memory_base_lr, config.global_memory_base_lr) == (0.1, pytest.approx(0.01))
    assert config.memory_norm_init == pytest.approx(1.7 / 8)
    assert TNTConfig(memory_residual_norm=False).memory_norm_init is None
    linear = TNTConfig(memory_type="linear")
    assert linear.memory_expansion == 1
    assert (linear.memory_base_lr, linear.global_memory_base_lr) == (1.0, pytest.approx(0.1))


def test_shard_lengths_has_one_entry_for_each_memory():
    assert TNTConfig(local_chunk_sizes=[4, 8], local_shard_lengths=64).shard_lengths == [64, 64]
    assert TNTConfig(local_chunk_sizes=[4, 8], local_shard_lengths=None).shard_lengths == [None, None]
    assert TNTConfig(local_chunk_sizes=(4, 8), local_shard_lengths=(16, None)).shard_lengths == [16, None]
    assert TNTConfig(local_chunk_sizes=[]).shard_lengths == []


def test_names_that_transformers_asks_for():
    config = TNTConfig(num_hidden_layers=3, num_heads=4)
    assert config.layer_types == ["tnt_memory"] * 3
    assert config.num_attention_heads == 4
    assert config.get_text_config(decoder=True) is config


@pytest.mark.parametrize("preset", PRESETS)
def test_save_and_load(preset, tmp_path):
    config = TNTConfig.from_preset(preset, architectures=["TNTForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    loaded = TNTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["local_chunk_sizes"] == config.local_chunk_sizes
    assert TNTConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_fields_only(preset):
    config = TNTConfig.from_preset(preset, use_cache=False)
    assert config.use_cache is False
    assert TNTConfig.from_preset(preset).use_cache is True


def test_available_presets():
    assert available_presets() == PRESETS


@pytest.mark.parametrize("name", ["tnt-7b", "", "../presets/tiny", None])
def test_unknown_preset_says_which_exist(name):
    with pytest.raises(ValueError, match="use one of " + ", ".join(PRESETS)):
        TNTConfig.from_preset(name)


def test_baselines_are_configurations_of_the_same_model():
    titans = TNTConfig.from_preset("titans-150m")
    assert (titans.global_chunk_size, titans.shard_lengths, titans.qk_projection) == (None, [None], "none")
    assert titans.use_momentum and titans.use_forget_gate and not titans.token_scale
    for name, base_lr in (("ttt-linear-125m", 1.0), ("ttt-mlp-125m", 0.1)):
        ttt = TNTConfig.from_preset(name)
        assert (ttt.local_chunk_sizes, ttt.token_scale, ttt.memory_base_lr) == ([16], True, base_lr)


@pytest.mark.parametrize("size, base", [("titans-{}-150m", "titans-150m"), ("tiny-{}", "tiny")])
def test_the_titans_family_is_one_model_with_attention(size, base):
    alone = TNTConfig.from_preset(base)
    for name, memory_as in (("mac", "context"), ("mag", "gate"), ("mal", "layer")):
        config = TNTConfig.from_preset(size.format(name))
        assert (config.memory_as, config.layer_types) == (memory_as, ["tnt_memory"] * config.num_hidden_layers)
        assert (config.use_momentum, config.use_forget_gate) == (alone.use_momentum, alone.use_forget_gate)
        reach = config.global_chunk_size if name == "mac" else config.sliding_window
        assert (reach, config.num_persistent_tokens) == ((64, 4) if base == "tiny" else (512, 16))


def test_hybrids_have_three_memories_to_one_attention():
    for preset in ("tnt-hybrid-150m", "tiny-hybrid"):
        kinds = TNTConfig.from_preset(preset).layer_types
        assert kinds == (["tnt_memory"] * 3 + ["full_attention"]) * (len(kinds) // 4)


def test_chunk_sizes_change_on_load(tmp_path):
    TNTConfig.from_preset("tiny").save_pretrained(tmp_path)
    loaded = TNTConfig.from_pretrained(tmp_path, local_chunk_sizes=[1], global_chunk_size=64)
    assert (loaded.local_chunk_sizes, loaded.global_chunk_size) == ([1], 64)
    assert loaded.local_shard_lengths == 256


def test_replacements_on_load_are_checked_together_with_the_saved_fields(tmp_path):
    TNTConfig.from_preset("tiny").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"local_chunk_sizes\[0\]=48 must divide local_shard_lengths=256; use 32 or 64"
    ):
        TNTConfig.from_pretrained(tmp_path, local_chunk_sizes=[48])
    with pytest.raises(ValueError, match="2 entries for the 1 of local_chunk_sizes"):
        TNTConfig.from_pretrained(tmp_path, local_shard_lengths=[64, 64])
    both = TNTConfig.from_pretrained(tmp_path, local_chunk_sizes=[48], local_shard_lengths=[96])
    assert both.shard_lengths == [96]


def test_misspelt_replacement_on_load(tmp_path):
    TNTConfig.from_preset("tiny").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="local_chunk_size is not a field of TNTConfig; did you mean local_chunk_sizes"
    ):
        TNTConfig.from_pretrained(tmp_path, local_chunk_size=[1])
    with pytest.raises(ValueError, match="did you mean local_chunk_sizes"):  # as the models' from_pretrained calls it
        TNTConfig.from_pretrained(tmp_path, local_chunk_size=[1], return_unused_kwargs=True)
    _, unused = TNTConfig.from_pretrained(tmp_path, device_map="cpu", return_unused_kwargs=True)
    assert unused == {"device_map": "cpu"}


def test_loads_through_the_auto_class(tmp_path):
    AutoConfig.register("tnt", TNTConfig, exist_ok=True)
    TNTConfig.from_preset("tiny").save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, local_chunk_sizes=[4]).local_chunk_sizes == [4]


def test_all_problems_at_once():
    found = problems_of(hidden_size=0, local_chunk_sizes=[48], token_scale=True, use_momentum=True, num_head=3)
    assert found == [
        "num_head is not a field of TNTConfig; did you mean num_heads?",
        "hidden_size must be an int of at least 1, got 0",
        "local_chunk_sizes[0]=48 must divide local_shard_lengths=2048; use 32 or 64",
        "token_scale=True excludes use_momentum=True; use one or the other",
    ]


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"vocab_size": "384"}, "vocab_size must be an int of at least 1, got '384'"),
        ({"num_heads": True}, "num_heads must be an int of at least 1, got True"),
        ({"head_dim": 0}, "head_dim must be an int of at least 1, or None for the default, got 0"),
        (
            {"num_heads": 7},
            "num_heads=7 must divide hidden_size=768 when head_dim is None; use 6 or 8, or set head_dim",
        ),
        ({"conv_kernel_size": -1}, "conv_kernel_size must be an int of at least 0 (0: no convolution), got -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number of at least 0, got nan"),
        (
            {"memory_base_lr": -1.0},
            "memory_base_lr must be a finite number of at least 0, or None for the default, got -1.0",
        ),
        (
            {"memory_norm_init": "small"},
            "memory_norm_init must be a finite number of at least 0, or None for the default, got 'small'",
        ),
        (
            {"memory_norm_init": 0.3, "memory_residual_norm": False},
            "memory_norm_init=0.3 needs the residual norm; use memory_residual_norm=True, or memory_norm_init=None",
        ),
        ({"memory_bias": 1}, "memory_bias must be True or False, got 1"),
        ({"memory_type": "deep"}, "memory_type must be one of 'mlp', 'linear', 'swiglu', got 'deep'"),
        ({"global_update": "adam"}, "global_update must be one of 'gradient', 'muon', got 'adam'"),
        (
            {"global_update": "muon", "global_chunk_size": None},
            'global_update="muon" is for the global memory, got global_chunk_size=None; set global_chunk_size, e.g. '
            '2048, or use global_update="gradient"',
        ),
        (
            {"global_update": "muon", "memory_initializer_range": 0.0},
            'global_update="muon" keeps the norms of the initial weights, which memory_initializer_range=0 makes zero; '
            'use None or a number above 0, or global_update="gradient"',
        ),
        ({"qk_projection": None}, "qk_projection must be one of 'shard', 'chunk', 'none', got None"),
        (
            {"kernel_backend": "cuda"},
            "kernel_backend must be one of 'auto', 'reference', 'torch', 'native', 'triton', got 'cuda'",
        ),
        ({"hidden_act": "silo"}, "hidden_act='silo' is not an activation of transformers; use 'silu'"),
        ({"pad_token_id": -1}, "pad_token_id must be a token id (an int of at least 0) or None, got -1"),
        (
            {"eos_token_id": [1, 40000]},
            "eos_token_id=[1, 40000] must be below vocab_size=32128; use a larger vocab_size",
        ),
        ({"global_chunk_size": 0}, "global_chunk_size must be an int of at least 1, or None, got 0"),
        (
            {"local_chunk_sizes": 8},
            "local_chunk_sizes must be a list with one int for each local memory, got 8; use [8]",
        ),
        ({"local_chunk_sizes": [8, 0]}, "local_chunk_sizes[1] must be an int of at least 1, got 0"),
        ({"local_shard_lengths": 0}, "local_shard_lengths must be an int of at least 1, or None, got 0"),
        ({"local_shard_lengths": [1.5]}, "local_shard_lengths[0] must be an int of at least 1, or None, got 1.5"),
        (
            {"local_chunk_sizes": [4096]},
            "local_chunk_sizes[0]=4096 must divide local_shard_lengths=2048; use 2048",
        ),
        (
            {"local_shard_lengths": [8, 8]},
            "local_shard_lengths has 2 entries for the 1 of local_chunk_sizes; "
            "give one for each, or one number for all",
        ),
        (
            {"local_chunk_sizes": [], "global_chunk_size": None},
            "there is no memory: give local_chunk_sizes an entry, e.g. [8], or set global_chunk_size, e.g. 2048",
        ),
        (
            {"memory_type": "linear", "memory_expansion": 2},
            "a linear memory has no hidden layer, got memory_expansion=2; use 1 or None",
        ),
        (
            {"qk_projection": "none", "normalize_projection": True},
            'normalize_projection=True needs a projection; use qk_projection="shard" or "chunk", or False',
        ),
        (
            {"num_attention_heads": 4},
            "num_attention_heads=4 is for attention layers, and no block attends; did you mean num_heads? Or set "
            "layer_types",
        ),
        (
            {"sliding_window": 8},
            "sliding_window=8 is for attention layers, and no block attends; set layer_types",
        ),
        (
            {"layer_types": ["memory"]},
            "layer_types has 1 entries for num_hidden_layers=12; give one for each block, or full_attention_interval=4 "
            "for three memories to one full attention",
        ),
        (
            {"num_hidden_layers": 1, "layer_types": ["full_atention"]},
            "layer_types[0] must be one of 'memory', 'full_attention', 'sliding_attention', got 'full_atention'; use "
            "full_attention",
        ),
        (
            {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            'layer_types with "sliding_attention" need a sliding_window of at least 2, got None; set it, e.g. to 512 '
            "tokens",
        ),
        (
            {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "sliding_window": 0},
            "sliding_window must be an int of at least 1, or None, got 0",
        ),
        (
            {"full_attention_interval": 13},
            "full_attention_interval=13 must be at most num_hidden_layers=12, or no block attends; use a smaller one, "
            "or None",
        ),
        (
            {"full_attention_interval": 4, "num_key_value_heads": 5},
            "num_key_value_heads=5 must divide num_attention_heads=12; use 4 or 6",
        ),
        (
            {"full_attention_interval": 4, "head_dim": 7},
            "head_dim=7 must be even for rotary positions, which turn pairs; use 8",
        ),
        (
            {"full_attention_interval": 4, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
            "rope_parameters has rope_type='dynamic', which depends on a longest context; use one of 'default', "
            "'linear'",
        ),
        ({"model_type": "llama"}, "model_type must be 'tnt', got 'llama'; load this checkpoint with AutoConfig"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_each_problem_names_rule_value_and_remedy(changes, problem):
    assert problems_of(**changes) == [problem]


def test_validate_after_a_change(tmp_path):
    config = TNTConfig.from_preset("tiny")
    config.validate()
    config.local_chunk_sizes = [48]
    with pytest.raises(ValueError, match="must divide local_shard_lengths=256"):
        config.validate()
    with pytest.raises(ValueError, match="must divide local_shard_lengths=256"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_what_transformers_itself_passes_is_accepted():
    config = TNTConfig(
        architectures=["TNTForCausalLM"], auto_map={"AutoConfig": "configuration_tnt.TNTConfig"}, torch_dtype="float32",
        transformers_version="5.17.0", num_labels=3, name_or_path="x", _name_or_path="x", attn_implementation="eager",
        output_hidden_states=True, return_dict=True, problem_type="regression", quantization_config={"bits": 8},
        model_type="tnt",
    )  # fmt: skip
    assert config.num_labels == 3
    assert config.output_hidden_states is True
    every_base_field = PreTrainedConfig().to_dict()
    TNTConfig(**{k: v for k, v in every_base_field.items() if k != "model_type"})


def test_names_agree_with_the_memory_operations():
    from modeling_tnt.kernels import backends, checks

    assert validation.KERNEL_BACKENDS == backends.BACKENDS
    assert validation.QK_PROJECTIONS == checks.QK_PROJECTIONS
    assert validation.GLOBAL_UPDATES == checks.UPDATES


def test_a_saved_config_records_the_version(tmp_path):
    TNTConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tnt_version"] == VERSION


def test_a_config_of_a_newer_version_says_so(tmp_path):
    TNTConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"tnt_version": "99.1.0", "memory_width": 3}))
    for load in (TNTConfig, AutoConfig):
        with pytest.raises(ValueError, match=r"memory_width is not a field of (.|\n)*saved by modeling-tnt 99\.1\.0"):
            load.from_pretrained(tmp_path)
    # What this version understands it reads.
    (tmp_path / "config.json").write_text(json.dumps(saved | {"tnt_version": "99.1.0"}))
    assert TNTConfig.from_pretrained(tmp_path).to_dict() == TNTConfig().to_dict()


@pytest.fixture
def warnings_of_configs(monkeypatch):
    """The texts that `TNTConfig` warns of."""
    texts = []
    monkeypatch.setattr("modeling_tnt.configuration.configuration_tnt.logger.warning_once", texts.append)
    return texts


def test_keys_that_somebody_has_set_are_kept_and_told_of(tmp_path, warnings_of_configs):
    config = TNTConfig.from_preset("tiny")
    config.pretraining_tp, config.local_chunk_size, config.note = 1, [1], {"run": 7}
    config.save_pretrained(tmp_path)
    for load in (TNTConfig, AutoConfig):
        loaded = load.from_pretrained(tmp_path)
        loaded.save_pretrained(tmp_path / "again")
        assert loaded.note == {"run": 7}
        assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    assert TNTConfig.from_json_file(tmp_path / "config.json").pretraining_tp == 1
    first, *others = warnings_of_configs
    assert (
        "pretraining_tp" in first and "note" in first and "local_chunk_size (did you mean local_chunk_sizes?)" in first
    )
    assert set(others) == {first} and len(others) == 2
    # Replaced like a field; what the file does not hold stays an error.
    assert TNTConfig.from_pretrained(tmp_path, pretraining_tp=2).pretraining_tp == 2
    with pytest.raises(ValueError, match="pretraining_to is not a field"):
        TNTConfig.from_pretrained(tmp_path, pretraining_to=2)
    with pytest.raises(ValueError, match="pretraining_tp is not a field"):
        TNTConfig(pretraining_tp=1)


@pytest.mark.parametrize("key", ["has_attention", "shard_lengths", "from_preset"])
def test_a_file_must_not_hold_what_stands_for_something_else(key):
    """Another name of a field, a property and a method."""
    with pytest.raises(ValueError, match=f"{key} is not a field of TNTConfig"):
        TNTConfig.from_dict({key: 3})


def test_what_is_told_of_extra_keys_is_bounded(warnings_of_configs):
    config = TNTConfig.from_dict({"x" * 10**6: 1} | {f"field{i}": i for i in range(10_000)})
    assert config.field9999 == 9999
    assert "and 9981 more" in warnings_of_configs[0] and len(warnings_of_configs[0]) < 2_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # What would take days if it were linear in the number.
        (
            {"local_shard_lengths": 2 * 10**9, "local_chunk_sizes": [3]},
            "local_chunk_sizes[0]=3 must divide local_shard_lengths=2000000000; use 2 or 4",
        ),
        ({"local_shard_lengths": 10**18}, f"local_shard_lengths must be at most 2147483647, got {10**18}"),
        ({"local_chunk_sizes": [10**18]}, f"local_chunk_sizes must be at most 2147483647, got {10**18}"),
        ({"hidden_size": 10**400, "num_heads": 7}, "hidden_size must be at most 2147483647, got 1000"),
        ({"head_dim": 10**400}, "head_dim must be at most 2147483647, got 1000"),
        ({"memory_base_lr": 10**400}, "memory_base_lr must be at most 2147483647, got 1000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000, got 1000000000"),
        ({"num_labels": 10**9}, "num_labels must be at most 1000000, got 1000000000"),
        ({"eos_token_id": [-1] * 100_000}, "eos_token_id must be a token id"),
        ({"local_chunk_sizes": [0] * 100_000, "local_shard_lengths": None}, "20 problems or more"),
        ({f"field{i}": i for i in range(100_000)}, "20 problems or more"),
        ({"x" * 10**6: 1}, " ..."),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:25],
)
def test_a_file_of_somebody_else_is_refused_at_once(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        TNTConfig(**fields)
    assert len(str(refused.value)) < 22_000


def test_divisors():
    assert divisors(1) == [1] and divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36] and divisors(7) == [1, 7]
