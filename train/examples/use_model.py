"""Use a model: text that appears while it is made, several prompts at once, and the same model at other local chunks.

python train/examples/use_model.py --model runs/quickstart/stage2 --prompt "def main" "import " --chunks 1
python train/examples/use_model.py                    # an untrained model, which answers with noise
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, TextStreamer

from modeling_tnt import TNTConfig, TNTForCausalLM

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--model", help="folder or Hub name of a model with its tokenizer; none: an untrained tiny one")
parser.add_argument("--prompt", nargs="+", default=["The memory reads", "A test"], help="one or several texts")
parser.add_argument("--chunks", type=int, nargs="+", help="tokens between two updates, a number for each local memory")
parser.add_argument("--new-tokens", type=int, default=64, help="tokens to continue each prompt by")
parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0: always the likeliest token")
parser.add_argument("--dtype", default="auto", help="of the weights: auto (as saved), float32, bfloat16 or float16")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
else:
    model, tokenizer = TNTForCausalLM(TNTConfig.from_preset("tiny")).eval(), ByT5Tokenizer()
    model = model if args.dtype == "auto" else model.to(getattr(torch, args.dtype))
model = model.to(args.device)
how = {"do_sample": args.temperature > 0, "max_new_tokens": args.new_tokens}
if args.temperature > 0:
    how["temperature"] = args.temperature
# Padding belongs on the left, where the model skips it, and the text that goes on ends in the last column.
tokenizer.padding_side = "left"
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
how["pad_token_id"] = tokenizer.pad_token_id


def read(texts: list[str]) -> dict[str, torch.Tensor]:
    """Token ids and mask without the end-of-text token that some tokenizers append."""
    return tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(args.device)


def show_batch(title: str) -> None:
    inputs = read(args.prompt)
    new = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
    print(f"\n{title}, chunks {model.config.local_chunk_sizes}:")
    for prompt, text in zip(args.prompt, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
        print(f"  {prompt!r} → {text!r}")


print(f"{args.prompt[0]!r}, streamed:")
model.generate(**read(args.prompt[:1]), **how, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
show_batch("all prompts as one batch")
if args.chunks:
    model.set_local_chunks(args.chunks)  # no weight changes; a smaller chunk reads more accurately and more slowly
    show_batch("the same weights")
