"""How routers of random weights deal tokens out: experts reached by steps, and by prompts.

    python benchmarks/router_loads.py [--model qwen1.5-moe-a2.7b] [--layers 4] [--batch 4]

attnlab's mixture at its real width and few layers on a CPU; each sequence has ids of its own. No
time is taken. Beside what steps reach stands what `planner.Routing` expects of uniform picks.
"""

from __future__ import annotations

import argparse
from statistics import fmean
from typing import Any

import torch

import planner
from attnlab.expert_loads import ExpertLoads, expert_loads
from planner.layers import MoE
from profiles.bench import random_ids
from profiles.workloads import build

PROMPT_TOKENS, STEPS = 128, 8


def main() -> None:
    """Two lines for each layer, and the means of the steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen1.5-moe-a2.7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    asked = parser.parse_args()
    config = dict(planner.load_model(asked.model).config)
    model = planner.read_config({**config, "num_hidden_layers": asked.layers})
    moe = next(layer.feed_forward for layer in model.layers if isinstance(layer.feed_forward, MoE))
    device = torch.device("cpu")
    workload: Any = build(model, runtime="attnlab", attention=None, dtype="bf16", device=device)
    ids = random_ids(model.vocab_size, asked.batch, PROMPT_TOKENS)
    workload.begin(batch=asked.batch, capacity_tokens=PROMPT_TOKENS + STEPS + 1)
    passes = workload.tokens(ids, output_tokens=STEPS + 1, logits="last")
    with torch.no_grad():
        prompt, *steps = (counted(workload.module, passes) for _ in range(STEPS + 1))
    for layer, imbalance in prompt.imbalance.items():
        print(f"layer {layer}: of a prompt the fullest expert gets {imbalance:.1f} x the mean")
    reached = [int((n > 0).sum()) for step in steps for n in step.tokens.values()]
    E, k = moe.num_experts, moe.num_experts_per_tok
    expected = float(planner.Routing().reached(E, k, asked.batch))
    print(
        f"{asked.model}, steps of {asked.batch} sequences reach {fmean(reached):.1f} of {E} experts"
        f" in the mean; {expected:.1f} are expected of uniform picks"
    )


def counted(module: Any, passes: Any) -> ExpertLoads:
    """The loads of the next pass."""
    with expert_loads(module) as loads:
        next(passes)
    return loads


if __name__ == "__main__":
    main()
