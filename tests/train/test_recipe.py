"""Recipes: YAML files and flags, all their problems at once, and the plan that they become."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train.cli import main
from modeling_tnt.train.loop.distributed import Layout
from modeling_tnt.train.loop.optim import learning_rate_at
from modeling_tnt.train.options import from_mapping, leaves, to_mapping
from modeling_tnt.train.plan import Stage, plan_stages, split_batch
from modeling_tnt.train.recipe import (
    ModelOptions,
    Recipe,
    StageOptions,
    available_recipes,
    load_recipe,
    recipe_from_mapping,
)


def _stage(**changes) -> Stage:
    """The first stage of the default recipe with 100 steps."""
    recipe = Recipe(stages=[StageOptions(name="stage1", **{"steps": 100} | changes)])
    return plan_stages(recipe, TNTConfig.from_preset("tiny"))[0]


# ---------------------------------------------------------------------------------------------------------------- YAML


def test_yaml_and_flags(tmp_path: Path, flags, capsys):
    """A flag replaces what the file says; the run keeps the recipe that came of both."""
    recipe = {
        "model": {"override": {"hidden_size": 32, "num_heads": 2, "head_dim": 16, "num_hidden_layers": 1}},
        "optimizer": {"learning_rate": "1e-3"},  # YAML 1.1 takes 1e-3 for text
        "stages": [{"steps": 1}, {"name": "later", "share": 0.5, "chunk_divisor": 8}],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    flags = [f for f in flags if f not in ("--stages.stage1.steps", "6")]
    more = ["--config", str(tmp_path / "r.yaml"), "--stages.later.chunk_divisor", "4", "--optimizer.beta2=0.99"]
    assert main([*flags, *more]) == 0
    saved = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert [s.name for s in saved.stages] == ["stage1", "later"] and saved.stages[1].chunk_divisor == 4
    assert saved.optimizer.learning_rate == 1e-3 and saved.optimizer.beta2 == 0.99
    assert saved.model.override["hidden_size"] == 32 and saved.model.override["local_chunk_sizes"] == [8]


def test_a_recipe_survives_yaml():
    recipe = Recipe()
    recipe.stages[1].local_shard_lengths, recipe.stages[1].name = [64, None], "second"
    assert recipe_from_mapping(yaml.safe_load(yaml.safe_dump(to_mapping(recipe))), "it") == recipe


def test_the_default_recipe_is_the_quickstart():
    assert load_recipe("quickstart") == Recipe()


def test_all_problems_of_a_file_at_once(tmp_path: Path, capsys):
    (tmp_path / "r.yaml").write_text(
        "modell: {preset: tiny}\ntraining: {batchsize: 3, seed: one}\ndata: 4\n"
        "stages: [{steps: 1.5, learning_rat: 3}]\n"
    )
    assert main(["train", "--config", str(tmp_path / "r.yaml")]) == 2
    message = capsys.readouterr().err
    assert "modell is unknown; did you mean model?" in message
    assert "training.batchsize is unknown; did you mean training.batch_size?" in message
    assert "training.seed must be a whole number, got 'one'" in message
    assert "stages[0].steps must be a whole number or null, got 1.5" in message
    assert "stages[0].learning_rat is unknown; did you mean stages[0].learning_rate?" in message
    assert "data must be a mapping of fields, got 4" in message


def test_no_such_recipe(tmp_path: Path, capsys):
    assert main(["train", "--config", "fast"]) == 2
    assert "no recipe has this name; use a .yaml file or one of" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text("a: [")
    assert main(["train", "--config", str(tmp_path / "r.yaml")]) == 2
    assert "is not valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"model: {preset: tiny}\ndata: {split: a}\nmodel: {}\n", r"duplicate key 'model', first in line 1; .*line 3"),
        (b"stages:\n- {steps: 1,\n   name: a, steps: 2}\n", r"duplicate key 'steps', first in line 2; .*line 3"),
        ("data: {sources: [für]}".encode("latin-1"), r"is not UTF-8 text \(.*0xfc in position 18.*; save it as UTF-8"),
        (b"a: [", "is not valid YAML: while parsing"),
        (b"a: " + b"[" * 3000, "is not valid YAML: maximum recursion depth"),
        (
            b"x0: &x0 [a, a]\n" + b"".join(b"x%d: &x%d [*x%d, *x%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 60)),
            "is not valid YAML: more than 100,000 values\n.*line 16",
        ),
    ],
)
def test_a_file_that_says_two_things_or_cannot_be_read(tmp_path: Path, content: bytes, says: str):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)--config {tmp_path / 'r.yaml'} .*{says}"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_anchors_and_merged_keys_are_no_duplicates(tmp_path: Path):
    stages = ["&a {name: one, steps: 3, schedule: wsd}", "&b {<<: *a, name: two}", "{<<: *b, name: three, steps: 1}"]
    (tmp_path / "r.yaml").write_text("stages:\n- " + "\n- ".join(stages))
    read = [(s.name, s.steps, s.schedule) for s in load_recipe(str(tmp_path / "r.yaml")).stages]
    assert read == [("one", 3, "wsd"), ("two", 3, "wsd"), ("three", 1, "wsd")]


@pytest.fixture
def write(tmp_path: Path):
    """Writes a recipe's file, and returns its name for --config."""

    def write(name: str, content: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    return write


def test_a_recipe_holds_what_differs_from_its_base(write):
    write("base/low.yaml", "base: tnt-150m\ntraining: {batch_size: 8}\nmodel: {override: {num_heads: 6}}")
    name = write(
        "own.yaml",
        """
base: base/low.yaml
training: {seq_len: 2048}
stages: [{name: stage2, share: null, steps: 9}, {name: more, steps: 1}]""",
    )
    recipe, base = load_recipe(name), load_recipe("tnt-150m")
    assert (recipe.training.seq_len, recipe.training.batch_size, recipe.training.mixed_precision) == (2048, 8, "bf16")
    assert recipe.model.override == {"local_shard_lengths": 4096, "num_heads": 6}
    assert recipe.data == base.data and recipe.optimizer == base.optimizer
    stage2 = replace(base.stages[1], share=None, steps=9)
    assert recipe.stages == [stage2, StageOptions(name="more", steps=1)], "stage1 is not listed"
    assert load_recipe(write("more.yaml", "base: own.yaml")) == recipe


def test_another_preset_begins_without_the_override_of_the_base(write):
    recipe = load_recipe(write("r.yaml", "base: tnt-150m\nmodel: {preset: titans-150m}"))
    assert recipe.model == ModelOptions(preset="titans-150m")


def test_stages_without_names_are_matched_by_their_place(write):
    write("base.yaml", "stages: [{steps: 1, schedule: wsd}, {share: 0.5}]")
    assert load_recipe(write("r.yaml", "base: base.yaml\nstages: [{}, {share: 0.1}]")).stages == [
        StageOptions("stage1", steps=1, schedule="wsd"), StageOptions("stage2", share=0.1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("tnt-150", "base 'tnt-150' is no file beside it, and no recipe's name; use a .yaml file or one of"),
        ("missing.yaml", "base 'missing.yaml' is no file beside it"),
        ("3", "base 3 is no file beside it"),
        ("r.yaml", "base 'r.yaml' leads in a circle; leave out"),
        ("a.yaml", "r.yaml, base a.yaml, base b.yaml: base '../{folder}/a.yaml' leads in a circle; leave out"),
    ],
)
def test_bases_that_are_none(write, tmp_path: Path, base: str, says: str):
    write("a.yaml", "base: b.yaml")
    write("b.yaml", f"base: ../{tmp_path.name}/a.yaml")
    with pytest.raises(ValueError, match=re.escape(says.format(folder=tmp_path.name))):
        load_recipe(write("r.yaml", f"base: {base}"))


def test_problems_of_a_file_and_of_its_base_at_once(write, capsys):
    base = write("base.yaml", "trainig: {}\nstages: [{name: a, steps: 1}]")
    name = write("r.yaml", "base: base.yaml\nstages: [{name: a, steps: x}]")
    assert main(["train", "--config", name]) == 2
    message = capsys.readouterr().err
    assert f"--config {name}, base base.yaml: trainig is unknown; did you mean training?" in message
    assert f"--config {name}: stages[0].steps must be a whole number or null, got 'x'" in message
    assert main(["train", "--config", write("r.yaml", "base: base.yaml\nstages: [{name: [a], steps: 1}, 3]")]) == 2
    message = capsys.readouterr().err
    assert "stages[0].name must be text, got ['a']" in message and "stages[1] must be a mapping of fields" in message
    assert main(["train", "--config", write("r.yaml", f"bas: {base}")]) == 2
    assert "bas is unknown; did you mean base?" in capsys.readouterr().err


def test_a_run_keeps_a_recipe_without_a_base(write, flags, tmp_path: Path):
    write("base.yaml", "optimizer: {beta2: 0.9}\nstages: [{name: one, steps: 1}]")
    flags = [f for f in flags if f not in ("--stages.stage1.steps", "6")]
    assert main([*flags, "--config", write("r.yaml", "base: base.yaml\noptimizer: {beta1: 0.8}")]) == 0
    (tmp_path / "base.yaml").unlink()
    saved = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert (saved.optimizer.beta1, saved.optimizer.beta2, saved.stages[0].name) == (0.8, 0.9, "one")


@pytest.mark.parametrize("name", available_recipes())
def test_shipped_recipes_can_be_planned(name: str):
    """Everything but their data, which is on the Hub."""
    recipe = load_recipe(name)
    assert recipe.problems() == []
    config = TNTConfig.from_preset(recipe.model.preset, **recipe.model.override)
    stages = plan_stages(recipe, config)
    assert split_batch(recipe, Layout()) <= recipe.training.batch_size
    assert recipe.output.dir.name == name and all(stage.steps > 0 for stage in stages)


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for leaf in leaves(Recipe()):
        assert "--" + leaf.path.replace("_", "-") in shown, leaf.path
        assert leaf.metadata["help"]


def test_sections_take_only_their_fields():
    problems: list[str] = []
    from_mapping(Recipe, {"output": {"trackers": "wandb"}, "training": {"compile": 1}}, "it", problems)
    assert problems == [
        "it: output.trackers must be a list of text, got 'wandb'", "it: training.compile must be true or false, got 1"
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- bad input


def test_all_problems_of_the_flags_at_once(flags, tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    more = ["--stages.stage1.steps", "0", "--optimizer.learning-rate", "-1", "--output.dir", str(tmp_path / "file")]
    more += ["--model.preset", "tnt-1b", "--training.micro-batch-size", "3", "--stages.stage2.schedule", "linear"]
    assert main([*flags, *more]) == 2
    message = capsys.readouterr().err
    assert "--stages.stage1.steps must be at least 1, got 0" in message
    assert "--optimizer.learning-rate must be above 0, got -1.0" in message
    assert f"{tmp_path / 'file'} is a file; give another folder" in message
    assert "'tnt-1b' does not exist; use one of tiny, tiny-hybrid, tiny-mac" in message
    assert "--training.micro-batch-size 3 must divide the 2 rows of a step" in message and "use 2" in message
    assert "--stages.stage2.schedule must be one of cosine, wsd, constant, got 'linear'" in message


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--stages.stage2.local-chunk-sizes", "3", "--stages.stage2.chunk-divisor", "none"],
         "--stages.stage2: TNTConfig has 1 problem:\n  1. local_chunk_sizes[0]=3 must divide "),
        (["--stages.stage2.local-chunk-sizes", "4", "2", "--stages.stage2.chunk-divisor", "none"],
         "has 2 entries; give one for each of the 1 local memories"),
        (["--stages.stage2.local-chunk-sizes", "4"], "takes local_chunk_sizes or chunk_divisor, got both"),
        (["--stages.stage2.steps", "4"], "takes exactly one of steps, tokens and share, got steps=4 and share=0.05; "
                                         "use --stages.stage2.steps none to leave one out"),
        (["--stages.stage1.steps", "none"], "takes exactly one of steps, tokens and share, got none of them"),
        (["--stages.stage2.seq-len", "48"], "--stages.stage2.seq-len 48 must divide the longest of the stages, 64"),
        (["--stages.stage1.schedule", "wsd", "--stages.stage1.decay-share", "0.95"], "must not exceed 1 together"),
        (["--model.override", "vocab_size=300"], "has 384 tokens, more than vocab_size=300"),
        (["--model.override", "num_head=3"], "did you mean num_heads?"),
        (["--model.override", "local_chunk_sizes=[]"], "no local memory to swap chunks of"),
        (["--data.tokenizer", "./nothing-here", "--training.batch-size", "0"], "./nothing-here could not be loaded"),
        (["--training.seq-len", "9000"], "the training side of the data has"),
        (["--training.seq-len", "3000"], "the validation side of the data has"),
        (["--data.sources", "missing.txt"], "missing.txt"),
        (["--training.mixed-precision", "fp8"], "--training.mixed-precision must be one of no, bf16, got 'fp8'"),
        (["--data.validation-share", "1"], "validation-share"),
        (["--output.trackers", "wandb"], "--output.trackers wandb needs the package of that name"),
        (["--output.trackers", "mlflow"], "--output.trackers must be one of tensorboard, wandb, trackio, got 'mlflow'"),
        (["--resume", "--overwrite"], "use one of them"),
        (["--model.architecture", "llama"], "a Llama has no local memories whose chunks could be swapped"),
        (["--model.start-from", "./nothing-here"], "--model.start-from ./nothing-here could not be read"),
    ],
)  # fmt: skip
def test_bad_arguments(flags, tmp_path: Path, capsys, more: list[str], says: str):
    assert main([*flags, *more]) == 2
    message = capsys.readouterr().err
    assert says in message and "Traceback" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["best"], "the name 'best' is taken by the folder of the best model"),
        (["Checkpoints"], "'Checkpoints' is taken by"),
        (["a", "a"], "the names 'a' and 'a' are of one folder"),
        (["a", "A"], "the names 'a' and 'A' are of one folder"),
        (["../victim"], "letters, digits, - and _, since a folder gets it, got '../victim'"),
        (["a.b"], "got 'a.b'"),
        ([""], "got ''"),
        (["x" * 65], "1 to 64 letters"),
    ],
)  # fmt: skip
def test_names_of_stages(tmp_path: Path, capsys, names: list[str], says: str):
    stages = [{"name": name, "steps": 1} for name in names]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"stages": stages, "modell": {}}))
    assert main(["train", "--config", str(tmp_path / "r.yaml")]) == 2
    message = capsys.readouterr().err
    assert says in message and "modell is unknown" in message and "Traceback" not in message
    assert any(says in problem for problem in Recipe(stages=[StageOptions(**stage) for stage in stages]).problems())


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([{"tokens": 1e300}], "--stages.stage1 would end after more than"),
        ([{"steps": 5}, {"share": 1e308}], "--stages.stage2 would end after more than"),
        ([{"steps": 5, "trainable": "local"}], "--stages.stage1.trainable local: the model has no local memory"),
    ],
)
def test_stages_that_cannot_be_trained(stages: list[dict], says: str):
    recipe = recipe_from_mapping({"stages": stages}, "it")
    with pytest.raises(ValueError, match=says):
        plan_stages(recipe, TNTConfig.from_preset("tiny", local_chunk_sizes=[]))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"training": {"seed": 2**32}}, "--training.seed must be at most 4294967295, got 4294967296"),
        ({"stages": [{"name": "a", "steps": 10**400}]}, "--stages.a.steps must be at most 9007199254740992, got 1000"),
        ({"stages": [{"steps": 1, "tokens": ".inf"}]}, "--stages.stage1.tokens must be finite, got inf"),
        ({"optimizer": {"learning_rate": "nan"}}, "--optimizer.learning-rate must be finite, got nan"),
        ({"optimizer": {"weight_decay": 11}}, "--optimizer.weight-decay must be at most 10, got 11.0"),
        ({"optimizer": {"beta2": 1}}, "--optimizer.beta2 must be below 1, got 1.0"),
        ({"output": {"push_every": "day"}}, "--output.push-every must be one of end, save, got 'day'"),
    ],
)
def test_a_value_outside_of_its_bounds(value: dict, says: str):
    problems = recipe_from_mapping(yaml.safe_load(yaml.safe_dump(value).replace("'.inf'", ".inf")), "it").problems()
    assert any(problem.startswith(says) for problem in problems), problems


def test_an_unknown_flag_suggests_a_known_one(flags, capsys):
    for typo, known in (
        ("--training.batchsize", "--training.batch-size"), ("--lerning-rate=3", "--optimizer.learning-rate"),
        ("--model.seq_len", "--training.seq-len"), ("--stages.stage3.steps", "--stages.stage1.steps"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main([*flags, typo])
        assert stop.value.code == 2
        assert f"did you mean {known}?" in capsys.readouterr().err


def test_override_takes_assignments(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--model.override", "num_heads"])
    assert stop.value.code == 2 and "--model.override takes field=JSON, got 'num_heads'" in capsys.readouterr().err


def test_another_run_is_not_replaced_unasked(flags, tmp_path: Path, capsys):
    short = [*flags, "--stages.stage1.steps", "1"]
    output_dir = tmp_path / "run"
    assert main(short) == 0
    (output_dir / "mine.txt").write_text("not the trainer's")
    before = (output_dir / "metrics.json").read_text()
    assert main(short) == 2
    assert "holds another run; give another folder, --output.resume to go on with it, or" in capsys.readouterr().err
    assert (output_dir / "metrics.json").read_text() == before
    assert main([*short, "--overwrite", "--training.seed", "5"]) == 0
    assert (output_dir / "metrics.json").read_text() != before and (output_dir / "mine.txt").exists()


def test_a_checkpoint_of_another_architecture_or_tokenizer(flags, tmp_path: Path, capsys):
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    LlamaConfig().save_pretrained(tmp_path / "llama")
    assert main([*flags, "--model.start-from", str(tmp_path / "llama")]) == 2
    assert "holds a model of type 'llama'; it must be of type 'tnt'" in capsys.readouterr().err

    TNTForCausalLM(TNTConfig.from_preset("tiny", num_hidden_layers=1)).save_pretrained(tmp_path / "tnt")
    words = Tokenizer(models.WordLevel({"<eos>": 0, "the": 1}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(tmp_path / "tnt")
    at = flags.index("--model.override")
    assert main([*flags[:at], "--model.start-from", str(tmp_path / "tnt")]) == 2
    message = capsys.readouterr().err
    assert (
        "is not the tokenizer of --model.start-from" in message
        and f"use --data.tokenizer {tmp_path / 'tnt'}" in message
    )


def test_weights_that_do_not_fit_their_config(flags, tmp_path: Path, capsys):
    TNTForCausalLM(TNTConfig.from_preset("tiny", num_hidden_layers=1)).save_pretrained(tmp_path / "tnt")
    at = flags.index("--model.override")
    start = ["--model.start-from", str(tmp_path / "tnt"), "--model.override", "num_hidden_layers=2"]
    assert main([*flags[:at], *start]) == 1
    assert "does not hold the weights of its model" in capsys.readouterr().err


def test_more_processes_than_rows(flags, monkeypatch, capsys):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 8)
    assert main([*flags, "--training.batch-size", "8", "--training.seq-len", "1024"]) == 2
    message = capsys.readouterr().err
    assert "at least 8 are needed for 8 processes; give more data" in message and "fewer processes" in message


# ---------------------------------------------------------------------------------------------------------------- plan


def test_stages():
    config = TNTConfig.from_preset("tiny", local_chunk_sizes=[64, 6, 2, 1], local_shard_lengths=192)
    recipe = Recipe()
    recipe.stages[0].steps = 200
    first, second = plan_stages(recipe, config)
    assert (first.steps, first.local_chunk_sizes, first.start_tokens) == (200, [64, 6, 2, 1], 0)
    assert (second.steps, second.local_chunk_sizes, second.start_tokens) == (10, [16, 1, 1, 1], 200 * 1024)
    assert second.learning_rate == pytest.approx(0.1 * first.learning_rate)
    recipe.stages[0].steps = 1
    assert plan_stages(recipe, config)[1].steps == 1


def test_stages_by_tokens_and_of_other_lengths():
    """A stage of longer rows begins at the next of its own rows; each divides the chunks that the one before left."""
    given = [{"tokens": 1000}, {"steps": 2, "seq_len": 256, "chunk_divisor": 2}, {"steps": 1, "chunk_divisor": 2}]
    recipe = recipe_from_mapping({"training": {"seq_len": 64, "batch_size": 3}, "stages": given}, "it")
    stages = plan_stages(recipe, TNTConfig.from_preset("tiny", local_chunk_sizes=[16]))
    assert [s.name for s in stages] == ["stage1", "stage2", "stage3"]
    assert [s.steps for s in stages] == [6, 2, 1]  # 1000 / 192 rounded up
    assert [s.start_tokens for s in stages] == [0, 1280, 1280 + 2 * 3 * 256]  # 6 · 192 = 1152, up to 5 · 256
    assert [s.local_chunk_sizes for s in stages] == [[16], [8], [4]]


def test_cosine():
    rates = [learning_rate_at(_stage(learning_rate=2.0), step) for step in range(100)]
    assert rates[:10] == pytest.approx([2 * (i + 1) / 10 for i in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)
    assert learning_rate_at(_stage(steps=1, learning_rate=1.0), 0) == 1.0


def test_wsd():
    """Warm-up over 10 of 100 steps, then the peak, then a straight line over the last 20 to a tenth."""
    stage = _stage(learning_rate=1.0, schedule="wsd")
    rates = [learning_rate_at(stage, step) for step in range(100)]
    assert rates[9:80] == [1.0] * 71
    assert rates[80:] == pytest.approx([1 - 0.9 * (i + 1) / 20 for i in range(20)])


def test_constant():
    assert [learning_rate_at(_stage(learning_rate=1.0, schedule="constant"), s) for s in (0, 9, 99)] == [0.1, 1.0, 1.0]


def test_an_untouched_stage_keeps_the_config():
    stage = _stage()
    config = TNTConfig.from_preset("tiny")
    assert (stage.local_chunk_sizes, stage.local_shard_lengths) == (config.local_chunk_sizes, config.shard_lengths)
    assert asdict(stage)["trainable"] == "all"
