"""The card that is predicted for, as its data sheet has it, and what is assumed of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """target: compute capability without its point; clock in Hz; rates in operations and bytes a second; shared: bytes
    of an SM, of which each block takes `shared_per_block` besides its own; launch: seconds from one kernel to the next.
    """

    name: str
    target: int
    multiprocessors: int
    clock: float
    highest_clock: float
    bandwidth: float
    bf16: float
    fp32: float
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    shared: int = 228 * 1024
    shared_per_block: int = 1024
    launch: float = 2e-6

    def blocks_of(self, registers: int, warps: int, shared: int) -> int:
        """Blocks that fit on one SM, of so many registers a thread, warps, and bytes of shared memory."""
        registers_of_warp = -(-registers * 32 // 256) * 256  # given out in units of 256
        return max(
            1,
            min(
                self.blocks,
                self.warps // warps,
                self.registers // (registers_of_warp * warps),
                self.shared // (shared + self.shared_per_block),
            ),
        )


H100 = Card(
    "NVIDIA H100 SXM", 90, multiprocessors=132, clock=1.755e9, highest_clock=1.98e9, bandwidth=3.35e12, bf16=989e12,
    fp32=67e12,
)  # fmt: skip

# Tokens a second of causal FlashAttention are taken from what it reaches of the bf16 peak, forward and backward
# together, with heads of 64: 300 to 410 TFLOP/s. Its times here are assumed, not predicted.
ATTENTION_RATES = (300e12, 410e12)
