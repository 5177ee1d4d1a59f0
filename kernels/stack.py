"""`MemoryStack`: the states of a layer's memories side by side, in buffers that the one-token step writes in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .types import MemoryState, is_of


class MemoryStack:
    """The states of the memories of one layer, which all have the same shapes.

    weights     [groups, memories, rows, H, P] float32 (float64 if a state is): the groups are weights, anchor and, with
                momentum, momentum; packed as `FastWeights.pack` does it.
    projection  [memories with a projection, rows, H, D, D], of the same dtype.
    position    [memories, rows, H] int64. The heads of a row have one counter each, equal ones: they are stepped by
                programs that do not wait for each other.
    states      one `MemoryState` for each memory: views of the above, which change as the memories are stepped.
    stepper     what the torch backend's step has prepared for these buffers, see `torch_backend.step`, or None.
    aligned_to  chunk sizes for which every row at the start of a chunk is known to have its weights as its anchor; None
                where that is not known, as in states that were made with other chunks.
    """

    def __init__(self, states: Sequence[MemoryState]) -> None:
        """Copy `states` into new buffers. Raises ValueError unless they agree in rows, shapes, momentum and device."""
        check_states(states)
        with torch.inference_mode(False):  # what is made in inference mode could be written only there
            self._allocate(states)
        self.stepper: object | None = None
        self.fill(states)

    def _allocate(self, states: Sequence[MemoryState]) -> None:
        first = states[0].weights
        rows, H, D, _ = first.w1.shape
        groups = 2 if states[0].momentum is None else 3
        size = sum(t[0, 0].numel() for t in first if t is not None)
        like = {"dtype": _dtype(states), "device": first.w1.device}
        projecting = sum(s.projection is not None for s in states)
        self.weights = torch.empty(groups, len(states), rows, H, size, **like)
        self.projection = torch.empty(projecting, rows, H, D, D, **like)
        self.position = torch.empty(len(states), rows, H, dtype=torch.int64, device=first.w1.device)
        self.states = self._views(states)

    def _views(self, states: Sequence[MemoryState]) -> tuple[MemoryState, ...]:
        projections = iter(self.projection)
        views = []
        for i, state in enumerate(states):
            groups = [state.weights.unpack(packed) for packed in self.weights[:, i]]
            views.append(
                MemoryState(
                    weights=groups[0],
                    anchor=groups[1],
                    momentum=groups[2] if len(groups) == 3 else None,
                    projection=None if state.projection is None else next(projections),
                    position=self.position[i, :, 0],
                )
            )
        return tuple(views)

    @property
    def rows(self) -> int:
        return self.position.shape[1]

    @property
    def slots(self) -> list[int]:
        """For each memory, where its projection is among the stacked ones; −1 without one."""
        slots, taken = [], 0
        for state in self.states:
            slots.append(-1 if state.projection is None else taken)
            taken += state.projection is not None
        return slots

    def fits(self, states: Sequence[MemoryState]) -> bool:
        """Whether `fill` can take these states as they are."""
        same = [_layout(s) for s in states] == [_layout(s) for s in self.states]
        return same and _dtype(states) == self.weights.dtype

    def fill(self, states: Sequence[MemoryState]) -> None:
        """Overwrite the buffers by `states`, which must fit; their addresses stay."""
        self.aligned_to: tuple[int, ...] | None = None
        for i, (view, state) in enumerate(zip(self.states, states, strict=True)):
            source = state.detach().tensors()
            self.position[i].copy_(source["position"].unsqueeze(-1))
            for name, target in view.tensors().items():
                if name != "position":
                    target.copy_(source[name])

    def select(self, rows: Tensor) -> MemoryStack:
        """A stack of its own with copies of the states of these rows (int64 indices)."""
        return MemoryStack([state.index_select(rows) for state in self.states])

    def put(self, rows: Tensor, part: MemoryStack) -> None:
        """Overwrite these rows by those of `part`: the inverse of `select`."""
        self.weights.index_copy_(2, rows, part.weights)
        self.projection.index_copy_(1, rows, part.projection)
        self.position.index_copy_(1, rows, part.position)


def check_states(states: Sequence[MemoryState]) -> None:
    """Raise ValueError or TypeError unless the states can be stacked."""
    if not states:
        raise ValueError("states must hold at least one MemoryState, got none")
    for i, state in enumerate(states):
        if not is_of(state, MemoryState):
            raise TypeError(f"states[{i}] must be a MemoryState, got {type(state).__name__}")
        ours, first = _layout(state), _layout(states[0])
        for layout in (ours, first):
            layout.pop("projection", None)  # a memory may have one or not
        if ours != first:
            names = sorted(n for n in ours.keys() | first.keys() if ours.get(n) != first.get(n))
            name = names[0]
            raise ValueError(
                f"states must agree in rows, shapes, momentum and device to be stacked: {name} of states[{i}] is "
                f"{ours.get(name)}, that of states[0] is {first.get(name)}; step such memories in separate calls"
            )


def _dtype(states: Sequence[MemoryState]) -> torch.dtype:
    return torch.float64 if any(s.weights.w1.dtype == torch.float64 for s in states) else torch.float32


def _layout(state: MemoryState) -> dict[str, tuple[torch.Size, torch.device]]:
    return {name: (t.shape, t.device) for name, t in state.tensors().items()}
