"""What a result was measured on, in words."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention", "titans-pytorch")


def describe_machine(device: torch.device) -> str:
    """The GPU's name, or the processor's and the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def describe_versions() -> str:
    """Versions of what has a part in the times, "torch 2.13.0, triton 3.7.1, …"; what is not installed is left out."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
