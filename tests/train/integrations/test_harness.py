"""lm-evaluation-harness on a saved model: its numbers are ours."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoConfig, ByT5Tokenizer

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train import lora_config, save_lora

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra eval")

from lm_eval.api.instance import Instance  # noqa: E402

from modeling_tnt.train.harness import TNTHarnessModel  # noqa: E402

QUESTIONS = [
    {"question": "the sky is", "answers": ["blue", "made of iron"], "right": 0},
    {"question": "one and one is", "answers": ["three", "two"], "right": 1},
    {"question": "a longer question about memories that learn as they read is", "answers": ["yes", "no"], "right": 0},
]  # fmt: skip
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: "{data}"}}
test_split: train
"""
TASKS = {
    "tiny_choice": (
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{answers}}"\ndoc_to_target: right\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    ),
    "tiny_rolling": (
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n"
    ),
    "tiny_generation": (
        'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answers[0]}}"\n'
        'generation_kwargs: {until: ["\\n\\n\\n"], max_gen_toks: 8}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    ),
}
CLOSE = {"rel": 1e-4}  # float32; rows are batched, hence summed in another order


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = TNTConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=1, num_heads=2, head_dim=16, intermediate_size=32,
        global_chunk_size=16, local_chunk_sizes=[8], local_shard_lengths=16, initializer_range=0.2, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    TNTForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)


def run_harness(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "modeling_tnt.train.harness", *arguments]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The model at local chunks of 2, its scores, and the requests and answers of each task by document."""
    folder = tmp_path_factory.mktemp("harness")
    write_model(folder / "model")
    (folder / "tasks").mkdir()
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, task in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + task)
    model_args = json.dumps({"pretrained": "model", "dtype": "float32", "local_chunk_sizes": [2]})
    done = run_harness(
        folder, "--model", "tnt", "--model_args", model_args, "--include_path", "tasks", "--tasks", ",".join(TASKS),
        "--device", "cpu", "--batch_size", "2", "--log_samples", "--output_path", "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads(next((folder / "out").rglob("results_*.json")).read_text())["results"]
    samples = {}
    for name in TASKS:
        lines = next((folder / "out").rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        samples[name] = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    return TNTForCausalLM.from_pretrained(folder / "model", local_chunk_sizes=[2]), scores, samples


@torch.no_grad()
def log_likelihood(model, before: str, text: str) -> float:
    """Of the bytes of `text`, in nats; a sequence that is all text begins with the end-of-text token."""
    context = [byte + 3 for byte in before.encode()] or [1]  # ByT5's ids
    tokens = torch.tensor([context + [byte + 3 for byte in text.encode()]])
    log_probs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
    return log_probs[len(context) - 1 :].sum().item()


@pytest.mark.slow
def test_multiple_choice(evaluated):
    model, scores, samples = evaluated
    right = []
    for question, sample in zip(QUESTIONS, samples["tiny_choice"], strict=True):
        expected = [log_likelihood(model, question["question"], f" {answer}") for answer in question["answers"]]
        assert [float(response[0][0]) for response in sample["resps"]] == pytest.approx(expected, **CLOSE)
        right.append(max((0, 1), key=expected.__getitem__) == question["right"])
    assert scores["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / 3)


@pytest.mark.slow
def test_rolling_likelihood(evaluated):
    model, scores, _ = evaluated
    texts = [question["question"] for question in QUESTIONS]
    nats = sum(log_likelihood(model, "", text) for text in texts)
    bits = -nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert scores["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits, **CLOSE)


@pytest.mark.slow
def test_generation(evaluated):
    """Batches of two are padded on the left."""
    model, _, samples = evaluated
    tokenizer = ByT5Tokenizer()
    for question, sample in zip(QUESTIONS, samples["tiny_generation"], strict=True):
        prompt = tokenizer(question["question"], add_special_tokens=False, return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
        assert sample["resps"] == [[tokenizer.decode(tokens, skip_special_tokens=True)]]


def test_the_config_accepts_what_the_harness_passes_on(tmp_path):
    """It hands gguf_file=None to AutoConfig.from_pretrained; what is misspelt is still refused."""
    write_model(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, gguf_file=None).local_chunk_sizes == [8]
    with pytest.raises(ValueError, match="did you mean local_chunk_sizes"):
        AutoConfig.from_pretrained(tmp_path, local_chunk_size=[4])


def score(lm, *pairs: tuple[str, str]) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def test_an_adapter_is_read_at_its_chunks(tmp_path):
    write_model(tmp_path / "model")
    base = TNTForCausalLM.from_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, lora_config(base, init_lora_weights=False))
    adapted.set_local_chunks([1], [4])
    save_lora(adapted, tmp_path / "adapter")
    arguments = {"pretrained": str(tmp_path / "model"), "dtype": "float32", "device": "cpu"}
    lm = TNTHarnessModel(**arguments, peft=str(tmp_path / "adapter"))
    expected = log_likelihood(adapted.eval(), "the sky", " is blue")
    assert score(lm, ("the sky", " is blue")) == [pytest.approx(expected, **CLOSE)]
    assert score(TNTHarnessModel(**arguments), ("the sky", " is blue")) != [pytest.approx(expected, **CLOSE)]


def test_the_tokenizers_own_habits_may_be_asked_for(tmp_path):
    """add_bos_token=True is the harness's name for "special tokens as the tokenizer adds them": ByT5 ends a text."""
    write_model(tmp_path / "model")
    lm = TNTHarnessModel(pretrained=str(tmp_path / "model"), device="cpu", add_bos_token=True)
    assert lm.tok_encode("ab") == [100, 101, 1]
    assert TNTHarnessModel(pretrained=str(tmp_path / "model"), device="cpu").tok_encode("ab") == [100, 101]


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.delitem(sys.modules, "modeling_tnt.train.harness")
    with pytest.raises(ImportError, match=r"is not installed; use pip install 'modeling-tnt\[eval\]'"):
        importlib.import_module("modeling_tnt.train.harness")


@pytest.mark.parametrize("preset", ["tiny-hybrid", "tiny-mac"])
def test_a_hybrid_is_scored_row_by_row_as_alone(preset: str):
    torch.manual_seed(0)
    model, tokenizer = TNTForCausalLM(TNTConfig.from_preset(preset)).eval(), ByT5Tokenizer()
    harness = TNTHarnessModel(model, tokenizer=tokenizer, batch_size=2, max_length=256)
    texts = [("the sky is", " blue"), ("one and one is rather", " two")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)]
    for (context, answer), (score, _) in zip(texts, harness.loglikelihood(requests), strict=True):
        ids = tokenizer(context + answer, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits.log_softmax(-1)[0, -len(answer) - 1 : -1]
        assert score == pytest.approx(logits.gather(1, ids[0, -len(answer) :, None]).sum().item(), **CLOSE)
