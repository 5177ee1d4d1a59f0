"""Where there is no GPU, Triton's kernels run in its interpreter, on CPU tensors."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so it must be set before the first of ours is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
