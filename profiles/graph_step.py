"""A decode step as a CUDA graph: what its kernels take when no host stands between them.

An engine that serves captures such steps once and replays them. A pass of ours knows the length of
its cache on the host, so each step is captured by itself, outside the clock, and replayed: the same
kernels on the same tensors. Replayed twice, it writes the same key into the same slot, or into the
next one where a cache counts its tokens on the device (transformers' StaticCache).
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from torch import Tensor

from planner import ConfigError
from profiles.workloads import Logits, Workload


@dataclass(frozen=True, slots=True)
class GraphStep:
    """A captured step; `token` [B, 1] is what its last replay put out."""

    graph: torch.cuda.CUDAGraph
    token: Tensor

    def replay(self) -> None:
        """All of the step's kernels, in order."""
        self.graph.replay()


@torch.no_grad()
def capture(workload: Workload, ids: Tensor, logits: Logits) -> GraphStep:
    """The step after the cached tokens, for tokens [B, 1]; nothing of it has run yet.

    The cache counts it as done. Kernels of such a step must have run before: a capture loads none.
    Raises ConfigError off a GPU.
    """
    if ids.device.type != "cuda":
        raise ConfigError(f"mode=graph is not measured on device={ids.device.type}: cuda")
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()  # an older graph that is collected meanwhile would spoil the capture
    try:
        with torch.cuda.graph(graph):
            token = workload.forward(ids, logits)[:, -1:].argmax(-1)
    finally:
        gc.enable()
    return GraphStep(graph, token)
