"""Load checkpoints by the code that they carry, and compare with what the package computed.

    python load_without_package.py FOLDER...

Each folder is a model with its tokenizer and `expected.json`; see `store_expected` in test_hub_export.py. Nothing of
this project may be importable. tests/modeling_tnt/test_hub_export.py runs it, and .ci/run does in a fresh environment.
"""

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)


def assert_same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of sums in float32, which depends on where weights lie in memory."""
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def check(folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "TNTConfig", type(config)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer(expected["prompt"], add_special_tokens=False, return_tensors="pt")
    assert prompt.input_ids.tolist() == expected["ids"]

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        logits = model(**prompt).logits
    assert_same(logits, torch.tensor(expected["logits"]))
    greedy = {"max_new_tokens": 12, "do_sample": False}
    assert model.generate(**prompt, **greedy).tolist() == expected["tokens"], "generated tokens differ"

    # A memory as an object, saved and read on from; a model with full attention has none.
    if "full_attention" not in model.config.layer_types:
        model.memorize(expected["ids"][0][:-1], progress=False).save_pretrained(folder / "memory")
        state = model.load_memory(folder / "memory")
        with torch.no_grad():
            assert_same(model(prompt.input_ids[:, -1:], cache=state).logits, logits[:, -1:])

    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        hidden = base(**prompt).last_hidden_state
    assert_same(model.lm_head(hidden), logits)

    load_classifier = AutoModelForSequenceClassification.from_pretrained
    classifier = load_classifier(folder, trust_remote_code=True, num_labels=3).eval()
    with torch.no_grad():
        assert_same(classifier(**prompt).logits, classifier.score(hidden[:, -1]))

    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    assert generate(expected["prompt"], **greedy)[0]["generated_text"] == expected["text"], "text differs"

    # What was loaded from a copy saves a copy that loads as well.
    again = folder.with_name(f"{folder.name}-again")
    model.save_pretrained(again)
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in again.glob("*.py")}
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
    with torch.no_grad():
        assert_same(reloaded(**prompt).logits, logits)


def check_what_is_left_behind(folder: Path) -> None:
    """What the package alone has: kernels are refused if they are named, and "auto" on a GPU, which a CPU is taken for
    here, says once that it goes without; presets are refused. Always with the remedy. On a CPU nothing is said."""
    remedy = "not with a checkpoint's code (No module named 'modeling_tnt'); pip install modeling-tnt"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.tensor([[5, 7, 9]])
    for backend in ("native", "triton"):
        model.config.kernel_backend = backend
        for call in (model, lambda ids: model.generate(ids, max_new_tokens=2, do_sample=False)):
            try:
                call(ids)
            except ValueError as error:
                assert f"backend='{backend}' cannot run" in str(error) and remedy in str(error), error
            else:
                raise AssertionError(f"kernel_backend={backend!r} ran without the package")

    try:
        type(model.config).from_preset("tiny")
    except ImportError as error:
        assert remedy in str(error), error
    else:
        raise AssertionError("there was a preset without the package")

    code = type(model).__module__.rpartition(".")[0]
    backends, step = (importlib.import_module(f"{code}.tnt_kernels_{name}") for name in ("backends", "step"))
    said = []
    backends.logger.warning = said.append
    model.config.kernel_backend = "auto"
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)
    assert not said, said

    choose, choose_step = backends.choose_backend, step.step_backend_for
    backends.choose_backend = lambda device_type, *call: choose("cuda", *call)
    step.step_backend_for = lambda *call: choose_step(*(torch.device("cuda") if c == model.device else c for c in call))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)
    said = [str(w.message) for w in caught if "runs the torch backend on cuda" in str(w.message)]
    assert len(said) == 1 and remedy in said[0], said
    backends.choose_backend, step.step_backend_for = choose, choose_step


def check_refusal(folder: Path) -> None:
    for load in (AutoConfig, AutoModelForCausalLM):
        try:
            load.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise AssertionError(f"{load.__name__} ran the code of {folder} without being told to trust it")


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert importlib.util.find_spec("modeling_tnt") is None, "modeling_tnt can be imported here"
    check_refusal(Path(sys.argv[1]))
    check_what_is_left_behind(Path(sys.argv[1]))
    for argument in sys.argv[1:]:
        check(Path(argument))
    print("loaded without the package" + ("" if importlib.util.find_spec("triton") else " and without triton"))
