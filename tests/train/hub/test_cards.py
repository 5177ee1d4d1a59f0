"""The model cards that a training run leaves, and `tnt card`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.hub_cards import find_problems, is_own_card
from modeling_tnt.train.cli import main
from modeling_tnt.train.common.provenance import find_origin, train_command
from modeling_tnt.train.data import DataOptions
from modeling_tnt.train.loop import trainer
from modeling_tnt.train.recipe import Recipe, load_recipe


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model that was saved outside of a run, without any card."""
    config = TNTConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=1, num_heads=2, head_dim=16)
    TNTForCausalLM(config).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").unlink(missing_ok=True)
    return tmp_path / "saved"


def _results(folder: Path) -> list[tuple[str, float]]:
    return [(r.metric_type, r.metric_value) for r in ModelCard.load(folder / "README.md").data.eval_results]


def test_a_run_leaves_a_card_with_each_model(flags, output_dir: Path, tmp_path: Path, monkeypatch):
    assert main([*flags, "--output.license", "mit", "--stages.stage2.trainable", "lora"]) == 0
    metrics = json.loads((output_dir / "metrics.json").read_text())
    scores = metrics["validation_bits_per_byte"]
    texts = {name: (output_dir / name / "README.md").read_text() for name in ("stage1", "stage2", "best")}
    for name, text in texts.items():
        assert find_problems(text) == [] and is_own_card(output_dir / name / "README.md")
        assert "# run-" + name in text and "license: mit" in text
        assert (output_dir / name / "loss.png").read_bytes() == (output_dir / "loss.png").read_bytes()
        assert "](loss.png)" in text and f"| bigram model |  | bits per byte | {scores['bigram']:.3f} |" in text
        assert str(tmp_path) not in text and "sources:\n  - your-text" in text and "local text" in text
        assert str(tmp_path) not in (output_dir / name / "card_facts.json").read_text()
    assert _results(output_dir / "stage1") == [("bits_per_byte", pytest.approx(scores["after_stage1"], rel=1e-5))]
    assert _results(output_dir / "stage2") == [("bits_per_byte", pytest.approx(scores["after_stage2"], rel=1e-5))]
    best = metrics["best_validation_bits_per_byte"]
    assert _results(output_dir / "best") == [("bits_per_byte", pytest.approx(best, rel=1e-5))]

    row = "| after stage1 | {} | bits per byte | {:.3f} ± 0."
    swapped = row.format(2, scores["after_stage1_at_stage2_chunks"])
    assert row.format(8, scores["after_stage1"]) in texts["stage1"]
    assert swapped in texts["stage1"] and swapped in texts["stage2"]
    assert "| Stage | stage1 | stage2 |" in texts["stage2"] and "| Stage | stage1 |\n" in texts["stage1"]
    for line in ("Local chunks | 8 | 2", "Trained | all weights | LoRA adapters", "Steps | 6 | 1"):
        assert f"| {line}" in texts["stage2"]
    assert "On 192 tokens of held-out documents of local text, which is not" in texts["stage2"]
    monkeypatch.chdir(tmp_path)  # in which the run lies: its path from here is said in full from now on
    assert main(["card", "run/stage2"]) == 0
    loaded = re.findall(r'from_pretrained\("(.*?)"', (output_dir / "stage2" / "README.md").read_text())
    assert set(loaded) == {"./run/stage2"} and Path(loaded[0]).is_dir()
    assert 'from_pretrained("./stage1")' in texts["stage1"]
    assert "`adapter/`" in texts["stage2"] and "`adapter/`" not in texts["stage1"]
    assert f"| {metrics['seconds']:,.0f} s |" in texts["stage2"] and "Time, with" not in texts["stage1"]
    assert "PEFT" in (output_dir / "stage2" / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_cards_of_a_run_that_was_interrupted(flags, output_dir: Path, monkeypatch, capsys):
    """A finished stage has its card at once; the rest comes when the run is done, unless somebody edited it."""
    finish_stage = trainer.Session.finish_stage

    def interrupted(self, stage, *args):
        if stage.name == "stage2":  # behind its last checkpoint, from which the run goes on
            raise KeyboardInterrupt
        finish_stage(self, stage, *args)

    monkeypatch.setattr(trainer.Session, "finish_stage", interrupted)
    assert main(flags) == 130
    card, best = output_dir / "stage1" / "README.md", output_dir / "best" / "README.md"
    assert "| after stage1 | 8 |" in card.read_text()
    assert "loss.png" not in card.read_text() and "| after stage1 | 2 |" not in card.read_text()
    best.write_text(edited := best.read_text() + "Mine.\n")
    # Results that tnt card added meanwhile stay.
    facts = json.loads((output_dir / "stage1" / "card_facts.json").read_text())
    facts["results"].append({"metric": "perplexity", "value": 3.25, "command": "tnt eval {model}"})
    (output_dir / "stage1" / "card_facts.json").write_text(json.dumps(facts))

    monkeypatch.setattr(trainer.Session, "finish_stage", finish_stage)
    assert main([*flags, "--resume"]) == 0
    assert "loss.png" in card.read_text() and "| after stage1 | 2 |" in card.read_text()
    assert "| perplexity | 3.25 |" in card.read_text() and "tnt eval ./stage1" in card.read_text()
    assert best.read_text() == edited
    assert f"{best} was edited, and is kept; tnt card --overwrite" in capsys.readouterr().out


@pytest.mark.slow
def test_an_edited_card_outlives_the_model_that_it_was_written_for(flags, output_dir: Path, monkeypatch):
    """The folder of the best model is replaced whenever a better one is found."""
    save_best, edited = trainer.Saver.save_best, []

    def edit_after(self, *args):
        save_best(self, *args)
        card = output_dir / "best" / "README.md"
        if not edited:
            edited.append(card.read_text() + "Mine.\n")
            card.write_text(edited[0])

    monkeypatch.setattr(trainer.Saver, "save_best", edit_after)
    more = ["--stages.stage1.steps", "20", "--output.eval-every", "10", "--optimizer.learning-rate", "0.01"]
    assert main([*flags, *more]) == 0
    assert (output_dir / "best" / "README.md").read_text() == edited[0]
    facts = json.loads((output_dir / "best" / "card_facts.json").read_text())
    assert facts["stages"][-1]["steps"] != 10  # a later model than the one whose card was edited


@pytest.mark.slow
def test_a_card_that_breaks_a_rule_keeps_no_model_from_being_saved(flags, output_dir: Path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise ValueError("this model card cannot be used: language")

    monkeypatch.setattr("modeling_tnt.train.hub.cards.write_card", broken)
    monkeypatch.setattr(trainer, "finish_cards", lambda *args, **kwargs: None)
    assert main([*flags, "--stages.stage1.steps", "1"]) == 0
    assert (output_dir / "stage2" / "model.safetensors").exists()
    assert "stage2 gets no model card: this model card cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [("Apache-2.0", "got 'Apache-2.0'; did you mean apache-2.0"), ("other", "--license other --license-name")],
)
def test_a_licence_that_the_hub_does_not_know(flags, capsys, name: str, message: str):
    assert main([*flags, "--output.license", name]) == 2
    assert message in capsys.readouterr().err


def test_a_llama_gets_no_card_of_ours(flags, output_dir: Path, tmp_path: Path):
    (tmp_path / "one.yaml").write_text("stages: [{name: stage1, steps: 1}]")
    flags = [f for f in flags if f not in ("--stages.stage1.steps", "6")]
    assert main([*flags, "--config", str(tmp_path / "one.yaml"), "--model.architecture", "llama"]) == 0
    assert not list(output_dir.rglob("README.md")) + list(output_dir.rglob("card_facts.json"))


# ---------------------------------------------------------------------------------------------- where a number is from


def test_the_command_that_trains_it_again(tmp_path: Path):
    assert train_command(Recipe()) == ("tnt train", None)
    recipe = load_recipe("tnt-150m")
    recipe.data.cache_dir = tmp_path
    recipe.output.dir = tmp_path
    command, text = train_command(recipe)
    assert command == "tnt train --config recipe.yaml" and str(tmp_path) not in text
    (tmp_path / "recipe.yaml").write_text(text)
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    again.data.cache_dir, again.output = recipe.data.cache_dir, recipe.output
    assert again == recipe
    recipe.model.start_from, recipe.data.tokenizer = str(tmp_path), str(tmp_path)
    assert "start_from: your-model" in train_command(recipe)[1]
    assert "tokenizer: your-tokenizer" in train_command(recipe)[1] and "allenai/c4" in train_command(recipe)[1]


def test_data_are_named_without_paths(text_folder: Path):
    hub = find_origin(DataOptions(sources=["allenai/c4"], config="en"))
    assert (hub.on_hub, hub.kind, hub.config, hub.split) == (True, "allenai/c4", "en", "train")
    assert find_origin(DataOptions()).kind == "python-stdlib"
    for sources in ([str(text_folder)], ["a.txt"], ["a", "b"], ["~/text"]):
        assert find_origin(DataOptions(sources=sources)).kind == "local-text"


# ------------------------------------------------------------------------------------------------------------- tnt card


def test_tnt_card_adds_what_was_evaluated(saved: Path, text_folder: Path, tmp_path: Path, capsys):
    data = ["--data.sources", str(text_folder), "--data.validation-share", "0.2", "--data.tokenizer", "byt5"]
    more = ["--seq-len", "64", "--eval-tokens", "256", "--tasks", "perplexity", "chunks", "retrieval"]
    sizes = ["--chunk-sizes", "8", "--retrieval-lengths", "64", "--retrieval-documents", "4"]
    where = ["--data.cache-dir", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "eval")]
    assert main(["eval", str(saved), *data, *more, *sizes, *where]) == 0
    files = {task: tmp_path / "eval" / f"{task}.json" for task in ("perplexity", "chunks", "retrieval")}

    add = ["card", str(saved), "--license", "other", "--license-name", "mine", "--languages", "de"]
    assert main([*add, "--eval", *map(str, files.values())]) == 0
    measured = json.loads(files["perplexity"].read_text())["models"]["saved"]
    metrics = {name: measured[name]["value"] for name in ("perplexity", "bits_per_byte")}
    assert dict(_results(saved)) == pytest.approx(metrics, rel=1e-5)
    text = (saved / "README.md").read_text()
    assert find_problems(text) == [] and str(tmp_path) not in text and "license_name: mine" in text
    command = "tnt eval ./saved --tasks perplexity --seq-len 64 --eval-tokens 256 --data.sources your-text"
    assert f"{command} --data.validation-share 0.2 --data.tokenizer byt5\n" in text
    assert "| 8 | bits per byte |" in text and "exact match" in text and "KEY = VALUE" in text

    # Once more, under another name: the facts were kept, and the same numbers stand there once.
    assert main(["card", str(saved), "--repo-id", "me/saved", "--eval", str(files["perplexity"])]) == 0
    again = (saved / "README.md").read_text()
    assert "license_name: mine" in again and "tnt eval me/saved --tasks chunks" in again
    assert again.count("| perplexity |") == 1 and again.count("trust_remote_code") == text.count("trust_remote_code")
    capsys.readouterr()

    for path, message in (
        (saved / "config.json", "config.json is no result of tnt eval"),
        (tmp_path / "nowhere.json", "nowhere.json"),
        (_changed(files["perplexity"], tmp_path, task="position"), "holds the task position; a card takes perplexity"),
        (_changed(files["perplexity"], tmp_path, sources={"saved": "other"}), "measured other, not "),
    ):
        assert main(["card", str(saved), "--eval", str(path)]) == 2
        assert message in capsys.readouterr().err
        assert (saved / "README.md").read_text() == again


def _changed(path: Path, folder: Path, **changes) -> Path:
    changed = folder / f"other-{next(iter(changes))}.json"
    changed.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return changed


def test_tnt_card_says_what_is_wrong_and_writes_nothing(saved: Path, tmp_path: Path, capsys):
    def fails(*arguments: str) -> str:
        assert main(["card", *arguments]) == 2
        return capsys.readouterr().err

    template = tmp_path / "mine.md"
    template.write_text("---\n{{ card_data }}\n---\n{{ autor }}\n")
    assert "no folder with config.json" in fails(str(tmp_path))
    assert "the variable autor in line 4, which does not exist" in fails(str(saved), "--template", str(template))
    assert "license must be an identifier" in fails(str(saved), "--license", "free")
    assert not (saved / "README.md").exists() and not (saved / "card_facts.json").exists()
    (saved / "README.md").write_text("# Mine\n")
    assert "is kept; use --overwrite to replace it" in fails(str(saved))
    assert (saved / "README.md").read_text() == "# Mine\n"
    template.write_text("---\n{{ card_data }}\n---\n# {{ title }}\n")
    assert main(["card", str(saved), "--template", str(template), "--overwrite"]) == 0
    assert "# saved\n" in (saved / "README.md").read_text()
