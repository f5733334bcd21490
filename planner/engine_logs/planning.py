"""One long sequence in a deployment: the estimate that a log is held against."""

from __future__ import annotations

from planner.errors import ConfigError
from planner.estimate import estimate
from planner.model import Model
from planner.result import Estimate
from planner.workload import Deployment, Inference


def longest_sequence(model: Model, deploy: Deployment, tokens: int) -> Estimate:
    """One sequence of `tokens` tokens, or of as many as model and engine take."""
    limits = (tokens, model.max_position_embeddings, deploy.max_model_tokens)
    prompt = max(1, min(limit for limit in limits if limit is not None) - 1)
    return estimate(model, Inference(batch=1, prompt_tokens=prompt), deploy)


def planned(model: Model, deploy: Deployment, tokens: int) -> Estimate | None:
    """The same; None for what is refused."""
    try:
        return longest_sequence(model, deploy, tokens)
    except ConfigError:
        return None
