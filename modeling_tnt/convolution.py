"""The short causal convolution behind the q, k and v projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packing import Packing


def is_watched(module: nn.Module) -> bool:
    """Whether hooks look at what goes into a module and comes out, so that nothing else may do its work."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution `y_t = Σ_j weight[:, j] · x_{t − K + 1 + j}` that stays inside each sequence.

    What lies before the first token of a sequence is zero, or the `tail` that an earlier call returned.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        tail: Tensor | None = None,
        return_tail: bool = False,
        one_token: bool = False,
        use: Callable[[Any, Tensor], Any] | None = None,
    ) -> tuple[Tensor, Tensor | None] | Any:
        """Convolve, or return what `use` makes of x and the weight.

        Args:
            x: [B, T, C], or [1, total, C] with `packing`.
            tail: the last K − 1 inputs of each sequence of an earlier call, [rows, K − 1, C].
            return_tail: also return those of this call, for every sequence; an empty one keeps its own.
            one_token: x holds one token of every row and nothing is packed, which takes fewer operations. The tail that
                is returned is a view.

        Returns:
            y, shaped like x, and the tail or None.
        """
        if use is not None:
            return use(x, self.weight)
        if one_token:
            return self._step(x, tail)
        reach = self.weight.shape[1] - 1
        rows = x.shape[0] if packing is None else packing.rows
        tail = x.new_zeros(rows, reach, x.shape[-1]) if tail is None else tail.to(x.dtype)
        if packing is None:
            padded = torch.cat([tail, x], dim=1)
            return self._convolve(padded), padded[:, x.shape[1] :].clone() if return_tail else None
        # Every sequence gets its tail put in front, which shifts token i of sequence n by (n + 1)(K − 1).
        output_index = torch.arange(x.shape[1], device=x.device) + packing.sequence_index * reach
        window = torch.arange(reach, device=x.device)
        begins = packing.cu_seqlens[:-1] + torch.arange(rows, device=x.device) * reach
        padded = x.new_zeros(x.shape[1] + rows * reach, x.shape[-1])
        padded = padded.index_copy(0, output_index + reach, x[0])
        padded = padded.index_copy(0, (begins[:, None] + window).flatten(), tail.flatten(0, 1))
        y = self._convolve(padded[None]).index_select(1, output_index)
        ends = begins + packing.cu_seqlens.diff()
        return y, padded[ends[:, None] + window] if return_tail else None

    def _step(self, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """One token of every row, x [B, 1, C], behind its tail [B, K − 1, C] (None: zeros): y [B, 1, C] and the new
        tail, a view. A window of K tokens is no work for a convolution: it is one product and one sum."""
        if tail is None:
            tail = x.new_zeros(x.shape[0], self.weight.shape[1] - 1, x.shape[-1])
        window = torch.cat([tail.to(x.dtype), x], dim=1)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = (window.to(wide) * self.weight.t().to(wide)).sum(1, keepdim=True)
        return y.to(x.dtype), window[:, 1:]

    def _convolve(self, padded: Tensor) -> Tensor:
        """[B, K − 1 + T, C] → [B, T, C]. As an image of height 1: tokens by channels is "channels last", which a CPU
        convolves six times as fast, backward included, as a grouped conv1d of the transposed tensor."""
        weight = self.weight[:, None, None].to(padded.dtype)
        image = padded.transpose(1, 2).unsqueeze(2)
        return F.conv2d(image, weight, groups=weight.shape[0]).squeeze(2).transpose(1, 2)
