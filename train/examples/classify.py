"""Train a classifier of texts with transformers' Trainer, on a toy set that is made here, and use it.

python train/examples/classify.py --output runs/classifier
python train/examples/classify.py --model runs/quickstart/stage2 --output runs/classifier    # from a trained model
"""

import argparse
from itertools import product

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from modeling_tnt import TNTConfig, TNTForSequenceClassification

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--model", help="folder or Hub name of a language model with its tokenizer; none: a new small one")
parser.add_argument("--output", required=True, help="folder for the classifier")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--learning-rate", type=float, default=3e-3)
args = parser.parse_args()

torch.manual_seed(0)
labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
if args.model:
    model = AutoModelForSequenceClassification.from_pretrained(args.model, **labels)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
else:
    tokenizer = ByT5Tokenizer()
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": len(tokenizer)}
    model = TNTForSequenceClassification(TNTConfig.from_preset("tiny", pad_token_id=0, **small, **labels))

if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model.config.pad_token_id = tokenizer.pad_token_id

rows = [
    {"text": " ".join(words), "label": label}
    for label, adjectives in enumerate((["bad", "dull", "weak"], ["good", "bright", "strong"]))
    for words in product(["a", "the", "one more"], adjectives, ["book", "day", "song", "film"])
]
data = Dataset.from_list(rows).map(lambda row: tokenizer(row["text"])).train_test_split(test_size=16, seed=0)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        args.output, max_steps=args.steps, per_device_train_batch_size=16, learning_rate=args.learning_rate,
        logging_steps=20, save_strategy="no", report_to="none",
    ),
    train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
    compute_metrics=lambda seen: {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())},
)  # fmt: skip
trainer.train()
print(f"accuracy on texts that were held out: {trainer.evaluate()['eval_accuracy']:.0%}")
trainer.save_model(args.output)
for answer in pipeline("text-classification", model=args.output)(["a good song", "a dull day"], batch_size=2):
    print(answer)
