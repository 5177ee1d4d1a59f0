"""Cards from facts: what they say, what they leave out, and whose README.md they replace."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from modeling_tnt import TNTConfig
from modeling_tnt.hub_cards import (
    CardFacts,
    ResultFacts,
    StageFacts,
    find_problems,
    is_own_card,
    load_facts,
    name_card,
    render_card,
    save_facts,
    write_card,
)

NAN = float("nan")


def make_config(**overrides) -> dict:
    return TNTConfig.from_preset("tiny", **overrides).to_dict()


def make_full_facts(**overrides) -> CardFacts:
    result = {"dataset": "held-out text", "command": "tnt train", "metric": "bits_per_byte"}
    given = {
        "config": make_config(), "parameters": 581840, "class_name": "TNTForCausalLM", "name": "run-stage2",
        "repo_id": "somebody/run-stage2", "tokenizer": "ByT5Tokenizer", "license": "cc-by-4.0", "languages": ["en"],
        "datasets": ["allenai/c4"], "data": "C4", "train_bytes": 1000, "train_documents": 9, "validation_documents": 2,
        "base_model": "somebody/base", "adapter": "adapter", "train_command": "tnt train --config recipe.yaml",
        "recipe": "training:\n  batch_size: 2", "plot": "loss.png", "seconds": 61.4, "hardware": "CPU",
        "hyperparameters": {"Seed": 7}, "versions": {"torch": "2.13.0"},
        "stages": [
            StageFacts("stage1", 60, 61440, 1024, 1, [16], [256], 3e-3, "cosine", "all", 12.0, 5120.0, 2.5),
            StageFacts("stage2", 3, 3072, 1024, 1, [4], [256], 3e-4, "cosine", "local", 1.0, 3072.0, 2.4),
        ],
        "results": [
            ResultFacts(value=2.61, label="after stage1", local_chunk_sizes=[16], **result),
            ResultFacts(value=2.4567891, label="after stage2", local_chunk_sizes=[4], own=True, **result),
        ],
    }  # fmt: skip
    return CardFacts(**given | overrides)


# ------------------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize(
    ("preset", "paper", "others"),
    [
        ("tiny", "2511.07343", "A Titans|A TTT"),
        ("tnt-150m", "2511.07343", "A Titans|A TTT"),
        ("tnt-hybrid-150m", "2511.07343", "A Titans|A TTT"),
        ("titans-150m", "2501.00663", "A TNT|A TTT"),
        ("titans-mac-150m", "2501.00663", "A TNT|A TTT"),
        ("titans-mag-150m", "2501.00663", "A TNT|A TTT"),
        ("ttt-linear-125m", "2407.04620", "A TNT|A Titans|TTT-MLP"),
        ("ttt-mlp-125m", "2407.04620", "A TNT|A Titans|TTT-Linear"),
    ],
)
def test_a_card_says_which_model_it_is(preset: str, paper: str, others: str):
    text = str(render_card(CardFacts(config=TNTConfig.from_preset(preset).to_dict())))
    first = text.split("# ", 1)[1].split("## ")[0]
    assert f"arxiv.org/abs/{paper}" in first and not re.search(others, first)
    assert all(f"arXiv:{number}" in text for number in ("2511.07343", "2501.00663", "2407.04620"))


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        (
            "tnt-hybrid-150m",
            ["Of its 12 blocks, numbers 4, 8, 12 have attention to all earlier tokens, whose keys and"],
        ),
        ("titans-mac-150m", ["Titans' MAC: within a segment of 512 tokens", "sees 16 learned tokens before the first"]),
        ("titans-mag-150m", ["Titans' MAG: it attends within 512 tokens", "| Heads of attention | 12 |"]),
        ("titans-mal-150m", ["Titans' MAL: it attends within 512 tokens to what", "| Persistent tokens | 16 |"]),
        ("titans-150m", []),
    ],
)
def test_a_card_says_which_blocks_attend(preset: str, words: list[str]):
    text = " ".join(str(render_card(CardFacts(config=TNTConfig.from_preset(preset).to_dict()))).split())
    for part in words:
        assert part in text
    assert words or not re.search("[Aa]ttention|Persistent", text.split("## ")[0])


@pytest.mark.parametrize(
    "facts",
    [
        CardFacts(config=make_config()),
        CardFacts(config={"model_type": "tnt"}),
        CardFacts(config=make_config(local_chunk_sizes=[], local_shard_lengths=None)),
        make_full_facts(
            parameters=None, train_bytes=None, seconds=NAN, hardware=None, plot=None, license=None, datasets=[],
            languages=[], tokenizer=None, hyperparameters={}, versions={}, base_model=None, adapter=None,
            stages=[StageFacts("stage1", train_bits_per_byte=NAN)],
            results=[ResultFacts("bits_per_byte", NAN, own=True), ResultFacts("perplexity", float("inf"))],
        ),
    ],
    ids=["bare", "empty", "no local memory", "not measured"],
)  # fmt: skip
def test_what_is_not_known_leaves_no_trace(facts: CardFacts):
    text = str(render_card(facts))
    assert not re.search(r"\bNone\b|\bnan\b|\binf\b|TODO|More information|\{\{|\}\}|\|\s*\|\s*\d|\n\n\n", text)
    assert "## Results" not in text and "model-index" not in text and "license" not in text
    assert "no measurement of its quality" in text
    if not facts.config.get("local_chunk_sizes"):
        assert "## Chunk sizes" not in text and "Q-K projection" not in text


def test_a_full_card_says_it_all():
    text = str(render_card(make_full_facts()))
    for part in (
        "| Stage | stage1 | stage2 |", "| Reset after | 256 | 256 |", "| Steps | 60 | 3 |",
        "| after stage1 | 16 | bits per byte | 2.610 |",
        "| after stage2 | 4 | bits per byte | 2.457 |", "```bash\ntnt train\n```", "tnt train --config recipe.yaml",
        "```yaml\ntraining:\n  batch_size: 2\n```", "](loss.png)", "| Parameters | 581,840 |", "| Hardware | CPU |",
        '"somebody/run-stage2", trust_remote_code=True', "set_local_chunks([1])", "`adapter/`", "| Seed | 7 |",
    ):  # fmt: skip
        assert part in text, part


def test_a_mismatch_is_spoken_of_where_one_was_measured():
    other = {"metric": "bits_per_byte", "label": "after stage2", "dataset": "held-out text"}
    bigram = ResultFacts(value=3.5, label="bigram model", metric="bits_per_byte", dataset="held-out text")
    (_, own), words = make_full_facts().results, "There is a mismatch between chunk sizes: these weights lose "
    for value, said in ((2.6, f"{words}0.143 bits per byte when they are read at local chunks 16."), (2.4, "")):
        worse = ResultFacts(value=value, local_chunk_sizes=[16], **other)
        text = str(render_card(make_full_facts(results=[bigram, own, worse])))
        assert said in text and ("mismatch" in text) == bool(said) and "that others are better" in text
    text = str(render_card(make_full_facts(results=[bigram, own])))
    assert "mismatch" not in text and "no measurement at others" in text


def test_results_have_errors_and_their_text_stands_once():
    result = {"metric": "bits_per_byte", "tokens": 1000, "command": "tnt train"}
    results = [ResultFacts(value=2.5, standard_error=0.01234, dataset="held-out text", **result)]
    text = str(render_card(make_full_facts(results=results)))
    assert "On 1,000 tokens of held-out text:\n\n| Measure | Value |" in text and "| 2.500 ± 0.012 |" in text
    results.append(ResultFacts(value=2.6, dataset="other text", **result))
    assert "| bits per byte | 2.600 | other text | 1,000 |" in str(render_card(make_full_facts(results=results)))


def test_a_card_gets_the_name_on_the_hub_if_nobody_has_changed_it(tmp_path: Path):
    facts = make_full_facts(repo_id=None, path="./run/stage2")
    card = write_card(tmp_path, facts)
    save_facts(tmp_path, facts)
    assert name_card(tmp_path, facts, "me/model") and not name_card(tmp_path, facts, "me/model")
    assert 'from_pretrained("me/model")' in card.read_text() and "./run" not in card.read_text()
    assert is_own_card(card) and load_facts(tmp_path, facts.config).repo_id == "me/model"
    (tmp_path / "mine.md").write_text(HEAD + "# Mine, {{ model_id }}")
    write_card(tmp_path, facts, tmp_path / "mine.md")  # of another template, which would be lost
    assert not name_card(tmp_path, facts, "me/model") and "# Mine, ./run/stage2" in card.read_text()


def test_the_code_in_a_card_is_python():
    for facts in (make_full_facts(), CardFacts(config=make_config(), class_name="TNTModel")):
        for block in re.findall(r"```python\n(.*?)```", str(render_card(facts)), re.DOTALL):
            compile(block, "card", "exec")


@pytest.mark.parametrize(
    ("class_name", "tag", "auto_class"),
    [
        ("TNTForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("TNTForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("TNTModel", "feature-extraction", "AutoModel"),
    ],
)
def test_the_pipeline_tag_is_that_of_the_class(class_name: str, tag: str, auto_class: str):
    card = render_card(make_full_facts(class_name=class_name))
    assert card.data.pipeline_tag == tag and f"import {auto_class}, AutoTokenizer" in card.text
    assert ("generate(" in card.text) == (tag == "text-generation")
    assert card.data.eval_results[0].task_type == tag


def test_without_code_beside_the_weights_none_is_promised():
    card = render_card(make_full_facts(remote_code=False))
    assert "trust_remote_code" not in card.text and "custom_code" not in card.data.tags


def test_metadata_come_back_through_the_hubs_own_class(tmp_path: Path):
    data = ModelCard.load(write_card(tmp_path, make_full_facts())).data
    assert (data.library_name, data.license, data.language) == ("transformers", "cc-by-4.0", ["en"])
    assert (data.datasets, data.base_model) == (["allenai/c4"], "somebody/base")
    assert data.tags == ["tnt", "test-time-training", "custom_code"] and data.model_name == "run-stage2"
    (result,) = data.eval_results  # the other one is not of these weights
    assert (result.metric_type, result.metric_value) == ("bits_per_byte", 2.45679)
    assert (result.dataset_type, result.dataset_name) == ("text", "held-out text")


def test_facts_are_saved_and_read_again(tmp_path: Path):
    facts = make_full_facts()
    assert load_facts(tmp_path, facts.config) is None
    save_facts(tmp_path, facts)
    assert load_facts(tmp_path, facts.config) == facts
    save_facts(tmp_path, make_full_facts(seconds=NAN, results=[ResultFacts("perplexity", NAN)]))
    read = load_facts(tmp_path, facts.config)
    assert read.seconds is None and read.results == []
    (tmp_path / "card_facts.json").write_text('{"stages": 3}')
    with pytest.raises(ValueError, match="card_facts.json holds no facts of a card"):
        load_facts(tmp_path, facts.config)


def test_only_tnt_models_are_described():
    with pytest.raises(ValueError, match="model_type is 'tnt', got 'llama'"):
        CardFacts(config={"model_type": "llama"})
    with pytest.raises(TypeError, match="use config.to_dict()"):
        CardFacts(config=TNTConfig.from_preset("tiny"))


# ----------------------------------------------------------------------------------------------------------- templates

HEAD = "---\n{{ card_data }}\n---\n"


def test_a_template_of_the_users_own(tmp_path: Path):
    template = tmp_path / "mine.md"
    template.write_text(HEAD + "# {{ title }} has {{ facts.parameters }}")
    assert render_card(make_full_facts(), template).text == "# run-stage2 has 581840"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{{ titel }} {{ author }}", r"the variable author in line 4, .*the variable titel in line 4, .*mean title\?"),
        ("{% if licence %}{% endif %}", "the variable licence in line 4"),
        ("{{ facts.lisense }}", "mine.md, line 4, uses what does not exist .*has no attribute 'lisense'"),
        ("\n{{ ''.__class__.__mro__ }}", "mine.md, line 5, does what the sandbox forbids"),
        ("{{ facts.config.update(a=1) }}", "line 4, does what the sandbox forbids"),
        ("{{ facts.__init__.__globals__ }}", "line 4, does what the sandbox forbids"),
        ("{{ 1 // 0 }}", "line 4, fails with ZeroDivisionError"),
        ("{{ range(10**9) }}", "line 4, fails with OverflowError"),
        ("{% include '/etc/passwd' %}", "line 4, fails with TypeError"),
        ("{{ title ", "is no Jinja2: line 4"),
        ("{% for %}", "is no Jinja2: line 4"),
    ],
)
def test_a_template_with_a_variable_that_does_not_exist(tmp_path: Path, body: str, message: str):
    template, readme = tmp_path / "mine.md", tmp_path / "README.md"
    template.write_text(HEAD + body)
    with pytest.raises(ValueError, match=message):
        write_card(tmp_path, make_full_facts(), template)
    assert not readme.exists()


def test_a_template_that_is_missing_or_has_no_metadata(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere.md"):
        render_card(make_full_facts(), tmp_path / "nowhere.md")
    (tmp_path / "mine.md").write_text("# {{ title }}")
    with pytest.raises(ValueError, match="must begin with its metadata"):
        render_card(make_full_facts(), tmp_path / "mine.md")
    (tmp_path / "mine.md").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        render_card(make_full_facts(), tmp_path / "mine.md")


# --------------------------------------------------------------------------------------------------------------- files


def test_a_card_is_written_again_until_somebody_edits_it(tmp_path: Path):
    facts = CardFacts(config=make_config())
    path = write_card(tmp_path, facts)
    assert f"# {tmp_path.name}\n" in path.read_text() and is_own_card(path)
    write_card(tmp_path, make_full_facts())
    assert "# run-stage2" in path.read_text()
    path.write_text(edited := path.read_text().replace("For research", "For everything"))
    with pytest.raises(FileExistsError, match=r"README.md was written or edited by somebody else.*overwrite=True"):
        write_card(tmp_path, facts)
    assert path.read_text() == edited
    write_card(tmp_path, facts, overwrite=True)
    assert "For everything" not in path.read_text() and os.listdir(tmp_path) == ["README.md"]


def test_a_hidden_folder_gives_no_name(tmp_path: Path):
    """It is what a save is prepared in, and is renamed."""
    (tmp_path / ".model.saving").mkdir()
    text = write_card(tmp_path / ".model.saving", CardFacts(config=make_config())).read_text()
    assert "# TNT model\n" in text and 'from_pretrained("./model")' in text and "saving" not in text


@pytest.mark.parametrize("foreign", [b"# mine\n", b"", b"\xff\xfe"])
def test_a_readme_of_another_origin_is_kept(tmp_path: Path, foreign: bytes):
    (tmp_path / "README.md").write_bytes(foreign)
    with pytest.raises(FileExistsError):
        write_card(tmp_path, CardFacts(config=make_config()))
    assert (tmp_path / "README.md").read_bytes() == foreign


def test_a_full_disk_leaves_the_old_card(tmp_path: Path, monkeypatch):
    path = write_card(tmp_path, CardFacts(config=make_config()))
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_card(tmp_path, make_full_facts())
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["README.md"]


# --------------------------------------------------------------------------------------------------------------- rules


def make_content(**changes) -> str:
    """A valid card with other metadata; what is None is taken out."""
    data = yaml.safe_load(str(render_card(make_full_facts())).split("---")[1]) | changes
    return f"---\n{yaml.safe_dump({k: v for k, v in data.items() if v is not None})}---\n# A model\n"


def make_index(**changes) -> list[dict]:
    result = {
        "task": {"type": "text-generation"}, "dataset": {"type": "text", "name": "Text"},
        "metrics": [{"type": "perplexity", "value": 3.5}],
    }  # fmt: skip
    return [{"name": "model", "results": [result | changes]}]


def test_a_card_without_problems():
    assert find_problems(make_content()) == []
    assert find_problems(render_card(make_full_facts())) == []
    assert find_problems(make_content(**{"model-index": make_index()})) == []
    assert find_problems(make_content(license="other", license_name="mine", license_link="LICENSE")) == []
    assert find_problems(make_content(language=["de", "code", "multilingual", "gsw"])) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"license": "Apache-2.0"}, "license must be an identifier .* got 'Apache-2.0'; did you mean apache-2.0"),
        ({"license": "my-own"}, "license must be an identifier"),
        ({"license": "other"}, "license other needs license_name"),
        ({"license": "other", "license_name": 3}, "license_name must be text, got 3"),
        ({"tags": "tnt"}, "tags must be a list, got 'tnt'"),
        ({"tags": ["tnt", 150]}, r"tags\[1\] must be text, got 150"),
        ({"metrics": "perplexity"}, "metrics must be a list"),
        ({"datasets": ["/home/me/text"]}, r"datasets\[0\] must be a name on the Hub, 'user/name', got '/home/me/text'"),
        ({"datasets": "a b"}, r"datasets\[0\] must be a name on the Hub"),
        ({"base_model": ["user/model", "../base"]}, r"base_model\[1\] must be a name on the Hub"),
        ({"language": "English"}, r"language\[0\] must be an ISO 639 code .* got 'English'"),
        ({"language": [False]}, r"language\[0\] must be an ISO 639 code .* got False"),
        ({"pipeline_tag": "Text Generation"}, "pipeline_tag must be one word"),
        ({"library_name": 3}, "library_name must be one word"),
        ({"base_model": ""}, "base_model is empty; leave it out"),
        ({"datasets": []}, "datasets is empty; leave it out"),
        ({"model-index": {}}, "model-index must be a list, got {}"),
        ({"model-index": ["model"]}, r"model-index\[0\] must be a mapping with name, results, got 'model'"),
        ({"model-index": [{"results": make_index()[0]["results"]}]}, r"model-index\[0\].name must be text, got None"),
        ({"model-index": [{"name": "model"}]}, r"model-index\[0\].results must be a list, got None"),
        ({"model-index": [{"name": "model", "results": [3]}]}, r"results\[0\] must be a mapping with task, dataset"),
        ({"model-index": make_index(task={"name": "x"})}, r"results\[0\].task.type must be text, got None"),
        ({"model-index": make_index(task="x")}, r"results\[0\].task must be a mapping with type, got 'x'"),
        ({"model-index": make_index(dataset={"type": "text"})}, r"results\[0\].dataset.name must be text"),
        ({"model-index": make_index(dataset={"type": "a b", "name": "x"})}, "dataset.type must be a dataset's name"),
        ({"model-index": make_index(metrics=[])}, r"metrics is empty; leave it out"),
        ({"model-index": make_index(metrics=["x"])}, r"metrics\[0\] must be a mapping with type, value"),
        ({"model-index": make_index(metrics=[{"value": 1.0}])}, r"metrics\[0\].type must be text"),
        ({"model-index": make_index(metrics=[{"type": "x"}])}, r"metrics\[0\].value must be a number or text"),
        ({"model-index": make_index(metrics=[{"type": "x", "value": True}])}, "value must be a number or text"),
        ({"model-index": make_index(metrics=[{"type": "x", "value": NAN}])}, "value must be a finite number, got nan"),
    ],
)  # fmt: skip
def test_each_rule_of_the_hub(changes: dict, problem: str):
    problems = find_problems(make_content(**changes))
    assert any(re.search(problem, text) for text in problems), problems


def test_the_licence_that_was_meant():
    for given, meant in {
        "mit license": "mit", "MIT": "mit", "The MIT License": "mit", "Apache License, Version 2.0": "apache-2.0",
        "apache 2": "apache-2.0", "GPLv3": "gpl-3.0", "GNU AGPL v3": "agpl-3.0", "BSD 3-Clause License": "bsd-3-clause",
        "CC BY-SA 4.0": "cc-by-sa-4.0", "The Unlicense": "unlicense",
    }.items():  # fmt: skip
        assert f"did you mean {meant}?" in "".join(find_problems(make_content(license=given))), given


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("# A model\n", "must begin with its metadata"),
        ("---\ntags: [a\n---\n", "must be valid YAML"),
        ("---\nlicense: mit\nlicense: mit\n---\n", "duplicate key 'license'"),
        ("---\n- a\n---\n", r"must be a mapping of fields, got \['a'\]"),
        ("---\nlicense:\n---\n", "license is empty"),
    ],
)
def test_metadata_that_are_no_mapping(content: str, problem: str):
    assert re.search(problem, "\n".join(find_problems(content)))


def test_all_problems_are_told_at_once(tmp_path: Path):
    with pytest.raises(ValueError, match=r"(?s)license must be .*language\[0\] must be .*datasets"):
        write_card(tmp_path, make_full_facts(license="free", datasets=["a b"], languages=["English"]))
    assert os.listdir(tmp_path) == []
