"""The `torchtune` runtime: pytorch/torchtune's recipes for one device, commit 1814feb17.

Of November 2024, when the project published what each of its techniques saves (README.md).
Training alone is planned, and that eager.
"""

from __future__ import annotations

from planner.runtimes.training_only import TrainingOnly


class Torchtune(TrainingOnly):
    """Its recipes on one device; Llama3ScaledRoPE keeps a cosine and a sine for two dimensions."""

    name = "torchtune"
    version = "1814feb17"
