"""Share a model: save it with its code, tokenizer and card, push it to the Hub, and load it back from there.

python train/examples/share_model.py --model runs/quickstart/best --repo your-name/your-model --private
python train/examples/share_model.py --output runs/shared --dry-run      # an untrained model, and nothing is sent
"""

import argparse
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train.hub.card_command import CardArguments, make_card
from modeling_tnt.train.hub.push import Target, push_model

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--model", help="folder or Hub name of a model with its tokenizer; none: an untrained tiny one")
parser.add_argument("--output", type=Path, default=Path("runs/shared"), help="folder for what is pushed")
parser.add_argument("--repo", default="your-name/your-model", help="repository on the Hub: user/name")
parser.add_argument("--license", default="apache-2.0", help="of the weights, an identifier of the Hub")
parser.add_argument("--max-shard-size", default="5GB", help="of a file of weights")
parser.add_argument("--private", action="store_true", help="make a new repository private")
parser.add_argument("--dry-run", action="store_true", help="list what would be sent, and send nothing")
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
else:
    model, tokenizer = TNTForCausalLM(TNTConfig.from_preset("tiny")).eval(), ByT5Tokenizer()

# The folder holds all that others need, so that trust_remote_code=True loads it without this package, too.
model.save_pretrained(args.output, max_shard_size=args.max_shard_size)
tokenizer.save_pretrained(args.output)
make_card(CardArguments(model=args.output, repo_id=args.repo, license=args.license))

# With HF_TOKEN or after `hf auth login`. Raises ValueError with all that is wrong; after a broken connection the same
# call goes on.
push_model(HfApi(), args.output, Target(args.repo, private=args.private), dry_run=args.dry_run)
if not args.dry_run:
    loaded = AutoModelForCausalLM.from_pretrained(args.repo)
    ids = tokenizer("The memory reads", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        # Equal but for the order of sums, which depends on where weights lie in memory.
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    print(f"{args.repo} holds {loaded.num_parameters():,} parameters and computes the same")
