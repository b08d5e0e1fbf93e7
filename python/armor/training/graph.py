"""A whole training step as one CUDA graph: the kernels are launched by the device alone. step.py makes it if
speed.cuda_graph asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from armor.training.step import TrainState

WARMUPS = 3  # steps on a stream of their own, in which kernels are compiled and memory is allocated: no capture may


class Captured(NamedTuple):
    """A graph, the batch that it reads and the record that it writes, always the same tensors."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor
    record: Tensor


class GraphedUpdate:
    """`update(state, x, y)`, captured once and replayed on batches of the same shape.

    Steps whose attack has not grown to its full radius, or whose weights AWP does not yet perturb, and the smaller last
    batch of an epoch run as they are: what a graph does never changes.
    """

    def __init__(self, update: Callable[[TrainState, Tensor, Tensor], Tensor]) -> None:
        self.update = update
        self.stream = torch.cuda.Stream()
        self.warmed = 0
        self.captured: Captured | None = None

    def __call__(self, state: TrainState, x: Tensor, y: Tensor) -> Tensor:
        settled = state.step >= max(state.attack_warmup, state.awp_warmup)
        if not settled or len(y) < state.config.batch_size:
            return self.update(state, x, y)
        if self.warmed < WARMUPS:
            return self._warm_up(state, x, y)
        if self.captured is None:
            self.captured = self._capture(state, x, y)
        self.captured.x.copy_(x)
        self.captured.y.copy_(y)
        self.captured.graph.replay()
        return self.captured.record.clone()

    def _warm_up(self, state: TrainState, x: Tensor, y: Tensor) -> Tensor:
        self.warmed += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            record = self.update(state, x, y)
        torch.cuda.current_stream().wait_stream(self.stream)
        return record

    def _capture(self, state: TrainState, x: Tensor, y: Tensor) -> Captured:
        """Records an update without doing it."""
        x, y = x.clone(), y.clone()
        for optimizer in (state.optimizer, state.dual_optimizer):
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(state.noise)
        with torch.cuda.graph(graph, stream=self.stream):
            record = self.update(state, x, y)
        return Captured(graph, x, y, record)
