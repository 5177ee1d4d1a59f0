"""Where the operators of this package are registered with torch.

A checkpoint carries a flat copy of this code, and several copies, of several versions, may be loaded beside the
package. torch keeps one operator a name, and a second registration takes the first one's away: so every copy has a
namespace of its own, made of the name of the package that it was imported as.
"""

from __future__ import annotations

import re

import torch

NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])

OPERATORS = getattr(torch.ops, NAMESPACE)
"""`OPERATORS.decode_step` is the operator that was registered as `f"{NAMESPACE}::decode_step"`."""
