"""bfloat16, float16 and tf32 as bits."""

from __future__ import annotations

import numpy as np


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 → float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 → uint16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + odd + np.uint32(0x7FFF)) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_float16(bits: np.ndarray) -> np.ndarray:
    """uint16 → float32."""
    return np.ascontiguousarray(bits, np.uint16).view(np.float16).astype(np.float32)


def to_float16(x: np.ndarray) -> np.ndarray:
    """float32 → uint16, rounded to nearest, ties to even; infinite where it is too large."""
    return x.astype(np.float16).view(np.uint16)


def from_tf32(bits: np.ndarray) -> np.ndarray:
    """uint32 → float32, without the 13 low bits, which a tensor core does not look at."""
    return (np.ascontiguousarray(bits, np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 → uint32, rounded to nearest, ties away from zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), rounded)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of their sign (the modifier .ftz)."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


FROM_HALF = {"bf16": from_bfloat16, "f16": from_float16}
TO_HALF = {"bf16": to_bfloat16, "f16": to_float16}
