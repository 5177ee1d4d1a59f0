"""What somebody does with the Hub that HF_ENDPOINT names, with this package: push a model in every way, and load it.

    python hub_user.py FOLDER WORK

FOLDER holds a model with its tokenizer; WORK is for new files. Run by test_push.py.
"""

import runpy
import sys
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from modeling_tnt import TNTForCausalLM
from modeling_tnt.train.cli import main

CARD = b"---\nlicense: mit\n---\n\nMy own words\n"
EXAMPLE = Path(__file__).parents[3] / "train" / "examples" / "share_model.py"
IDS = torch.arange(3, 27)[None]


def compute(model: TNTForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def check_same(name: str, expected: torch.Tensor, **options: str) -> TNTForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(name, **options)
    assert type(model) is TNTForCausalLM
    torch.testing.assert_close(compute(model), expected, rtol=0, atol=0, msg=name)
    return model


def run(folder: Path, work: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = compute(model)

    assert main(["push", str(folder), "user/command", "--revision", "v2"]) == 0
    check_same("user/command", expected, revision="v2")

    model.push_to_hub("user/method", max_shard_size="60KB", tags=["tnt", "mine"])
    model.push_to_hub("user/method")  # and the shards are gone
    tokenizer.push_to_hub("user/method")
    check_same("user/method", expected)
    assert AutoTokenizer.from_pretrained("user/method").get_vocab() == tokenizer.get_vocab()

    (work / "saved").mkdir()
    (work / "saved" / "notes.txt").write_text("not the model's")
    model.save_pretrained(work / "saved", push_to_hub=True, repo_id="user/saved")
    check_same("user/saved", expected)
    HfApi().upload_file(path_or_fileobj=CARD, path_in_repo="README.md", repo_id="user/saved")
    model.save_pretrained(work / "sharded", push_to_hub=True, repo_id="user/saved", max_shard_size="60KB")
    check_same("user/saved", expected)

    share = [str(EXAMPLE), "--model", str(folder), "--repo", "user/shared", "--output", str(work / "shared")]
    for sys.argv in ([*share, "--dry-run"], share):
        runpy.run_path(str(EXAMPLE), run_name="__main__")

    arguments = TrainingArguments(
        output_dir=work / "trainer", max_steps=1, per_device_train_batch_size=1, report_to=[], push_to_hub=True,
        hub_model_id="user/trainer", disable_tqdm=True, use_cpu=True, save_steps=1,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub()
    check_same("user/trainer", compute(trainer.model))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(*map(Path, sys.argv[1:]))
    print("all loaded")
