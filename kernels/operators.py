"""Where the operators of this package are registered with torch.

A checkpoint carries a flat copy of this code, and several copies, of several versions, may be loaded beside the
package. torch keeps one operator a name, and a second registration takes the first one's away: so every copy has a
namespace of its own, made of the name of the package that it was imported as.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef

NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])

OPERATORS = getattr(torch.ops, NAMESPACE)
"""`OPERATORS.decode_step` is the operator that was registered as `f"{NAMESPACE}::decode_step"`."""


def operator(
    fake: Callable[..., Any], mutates_args: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register the function below as the operator of its name, whose arguments its annotations describe.

    fake: given the same arguments, all by position, returns tensors like the operator's, with nothing written in them.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        definition = torch.library.custom_op(f"{NAMESPACE}::{function.__name__}", function, mutates_args=mutates_args)
        definition.register_fake(fake)
        return definition

    return register
