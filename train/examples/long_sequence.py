"""One long sequence over several processes: a training step, and a document that all of them read together.

.venv/bin/torchrun --nproc-per-node 2 train/examples/long_sequence.py --tokens 8192
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.context_parallel import boundary_bytes

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--preset", default="tiny", help="preset of an untrained model")
parser.add_argument("--tokens", type=int, default=8192, help="length of the sequence")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()

dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device(args.device, rank % torch.cuda.device_count() if args.device == "cuda" else None)
torch.manual_seed(0)  # the same model and the same tokens in every process
model = TNTForCausalLM(TNTConfig.from_preset(args.preset)).to(device)
ids = torch.randint(model.config.vocab_size, (1, args.tokens), device=device)

model.enable_context_parallel(dist.group.WORLD)

wrapped = DistributedDataParallel(model)
loss = wrapped(input_ids=ids, labels=ids).loss  # of the whole sequence
loss.backward()
context = model.context_parallel
print(
    f"rank {rank} of {ranks} read tokens {context.columns(args.tokens)}, sent {context.sent_bytes:,} bytes to its "
    f"neighbours and waited {context.waited_seconds:.2f} s for them; loss {loss.item():.4f}"
)

state = model.memorize(ids, progress=False)  # whole, in every process
with model.pause_context_parallel():
    answer = model.generate(ids[:, :1], cache=state.clone(), max_new_tokens=4, do_sample=False)
if rank == 0:
    layer = boundary_bytes(model.config, len(context.columns(args.tokens)))
    print(f"a layer hands on {sum(layer.values()):,} bytes: {layer}")
    print(f"after {state.tokens_read.item():,} tokens it goes on with {answer[0, 1:].tolist()}")
dist.destroy_process_group()
