"""Read a document of any length in constant memory, continue it, and keep what was read as a folder.

python train/examples/memorize_document.py --model runs/quickstart/stage2 --text book.txt --output runs/book
python train/examples/memorize_document.py --preset tiny --tokens 1000000 --output runs/million
torchrun --standalone --nproc-per-node 2 train/examples/memorize_document.py …  # two devices read it together
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from modeling_tnt import TNTConfig, TNTForCausalLM

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
source = parser.add_mutually_exclusive_group(required=True)
source.add_argument("--model", help="folder or Hub name of a model with its tokenizer")
source.add_argument("--preset", help="an untrained model of this preset, which reads bytes")
document = parser.add_mutually_exclusive_group(required=True)
document.add_argument("--text", type=Path, help="text file, UTF-8")
document.add_argument("--tokens", type=int, help="so many random bytes instead of a text")
parser.add_argument("--output", required=True, help="folder for what was read")
parser.add_argument("--every", type=int, default=100_000, help="tokens between two reports")
parser.add_argument("--new-tokens", type=int, default=32, help="tokens to continue the document by")
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
else:
    model, tokenizer = TNTForCausalLM(TNTConfig.from_preset(args.preset)).eval(), ByT5Tokenizer()
if args.text:
    ids = np.asarray(tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"], np.int32)
else:
    ids = np.random.default_rng(0).integers(3, 259, args.tokens).astype(np.int32)
if len(ids) < 2:
    parser.error(f"the document has {len(ids)} tokens; give at least 2")
process = PartialState(cpu=not torch.cuda.is_available())
model = model.to(process.device)
document, prompt = ids[:-1], torch.tensor(ids[None, -1:], dtype=torch.int64, device=model.device)  # the last token
if process.num_processes > 1:  # each reads a part of every piece, and has the state of all of it
    model.enable_context_parallel(torch.distributed.group.WORLD)
state, begin = None, time.perf_counter()
for i in range(0, len(document), args.every):
    state = model.memorize(document[i : i + args.every], state=state)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB
    read = state.tokens_read.item()
    speed = read / (time.perf_counter() - begin)
    process.print(f"{read:,} tokens, {speed:,.0f}/s, peak memory {peak:,.0f} MiB, state {state.nbytes / 2**20:.2f} MiB")
model.disable_context_parallel()
if not process.is_main_process:
    raise SystemExit

state.save_pretrained(args.output)
greedy = {"max_new_tokens": args.new_tokens, "do_sample": False}
continued = model.generate(prompt, cache=state.clone(), **greedy)
print("continues:", repr(tokenizer.decode(continued[0, 1:], skip_special_tokens=True)))
assert torch.equal(model.generate(prompt, cache=model.load_memory(args.output), **greedy), continued)
print(f"{args.output} holds {state}, and continues in the same way")
