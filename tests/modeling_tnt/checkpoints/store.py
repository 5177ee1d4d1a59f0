"""Store small checkpoints of this version; see README.md. Refuses to replace any."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from modeling_tnt import TNTConfig, TNTForCausalLM, __version__

SHARED = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1, "intermediate_size": 16,
    "global_chunk_size": 8, "local_shard_lengths": 8, "initializer_range": 0.2, "memory_base_lr": 0.5,
    "global_memory_base_lr": 0.5,
}  # fmt: skip
KINDS = {
    "tnt-mlp": {"local_chunk_sizes": [4], "tie_word_embeddings": True},
    "titans-mlp": {
        "global_chunk_size": None, "local_shard_lengths": None, "local_chunk_sizes": [4], "qk_projection": "none",
        "use_momentum": True, "use_forget_gate": True,
    },
    "tnt-linear-two-locals": {"memory_type": "linear", "local_chunk_sizes": [2, 4], "qk_projection": "chunk"},
    "ttt-linear": {
        "memory_type": "linear", "global_chunk_size": None, "local_shard_lengths": None, "local_chunk_sizes": [4],
        "qk_projection": "none", "token_scale": True,
    },
}  # fmt: skip


def store(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = TNTForCausalLM(TNTConfig(**SHARED | KINDS[kind])).eval()
    model.save_pretrained(folder)
    for path in [*folder.glob("*.py"), folder / "README.md"]:
        path.unlink(missing_ok=True)
    tokens = torch.randint(1, SHARED["vocab_size"], (2, 21))
    with torch.no_grad():
        save_file({"input_ids": tokens, "logits": model(tokens).logits}, folder / "expected.safetensors")


if __name__ == "__main__":
    for kind in KINDS:
        folder = Path(__file__).parent / f"{__version__}-{kind}"
        if folder.exists():
            raise SystemExit(f"{folder} exists, and guards what was released; raise VERSION first")
        store(folder, kind)
        print(folder)
