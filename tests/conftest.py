"""Where there is no GPU, Triton's kernels run in its interpreter, on CPU tensors; and one thread a process."""

import os

# Tensors are tiny here, and the suite runs in several processes, whose threads would wait for each other. Torch reads
# it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so it must be set before the first of ours is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
