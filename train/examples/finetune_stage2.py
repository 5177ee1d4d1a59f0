"""Stage 2 of a saved model with transformers' own Trainer: fine-tune it at smaller local chunks on a text file.

python train/examples/finetune_stage2.py --model runs/quickstart/stage1 --text book.txt --chunks 4 --output runs/my
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import modeling_tnt  # noqa: F401 (lets the Auto classes know TNT)
from modeling_tnt.train import TwoStageCallback, lora_config, save_lora

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--model", required=True, help="folder or Hub name of a model of stage 1, with its tokenizer")
parser.add_argument("--text", required=True, type=Path, help="text file, UTF-8")
parser.add_argument("--output", required=True, help="folder for checkpoints and the fine-tuned model")
parser.add_argument("--chunks", type=int, nargs="+", default=[1], help="tokens, one number for each local memory")
parser.add_argument("--stage1-steps", type=int, default=0, help="steps at the model's own chunks before the swap")
parser.add_argument("--steps", type=int, default=100, help="steps in all")
parser.add_argument("--context", type=int, default=1024, help="tokens a row")
parser.add_argument("--batch-size", type=int, default=4, help="rows a step and device")
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--lora", action="store_true", help="train a LoRA adapter and the local memories only")
parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)
tokens = tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
rows = [tokens[i : i + args.context] for i in range(0, len(tokens) - args.context + 1, args.context)]
if not rows:
    parser.error(f"{args.text} has {len(tokens)} tokens, less than one row of --context {args.context}")
if args.lora:
    from peft import get_peft_model

    model = get_peft_model(model, lora_config(model))

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        args.output, max_steps=args.steps, per_device_train_batch_size=args.batch_size, lr_scheduler_type="cosine",
        learning_rate=args.learning_rate, weight_decay=0.1, warmup_steps=args.steps // 20, max_grad_norm=1.0,
        logging_steps=max(1, args.steps // 10), save_steps=max(1, args.steps // 2), report_to="none",
    ),
    train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
    data_collator=default_data_collator,
    processing_class=tokenizer,
    callbacks=[TwoStageCallback(args.chunks, step=args.stage1_steps)],
)  # fmt: skip
trainer.train(resume_from_checkpoint=args.resume)
if args.lora:
    save_lora(model, args.output)
else:
    trainer.save_model(args.output)
