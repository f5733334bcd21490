"""The `litgpt` runtime: finetuning with Lightning-AI/lit-gpt, commit 0f021f3a of January 2024.

Training alone is planned. The commit is the first whose scripts run every row of the tables that
the project has published of itself (tutorials/resource-tables.md); what they are said to have run
with are torch 2.1 and bitsandbytes 0.41.1.
"""

from __future__ import annotations

from planner.runtimes.training_only import TrainingOnly


class LitGPT(TrainingOnly):
    """lit-gpt's finetuning scripts on one device; GPT.rope_cache has a table of cosines, one of
    sines."""

    name = "litgpt"
    version = "0f021f3a"
    tables = 2
    elements_per_dim = 2
