"""Which k of E experts a token goes to, with what weights: by a score each, the best are taken.

softmax         softmax of all scores, those of the best k perhaps renormalised (mixtral, qwen-moe)
sigmoid         sigmoids of the best k, not of competing experts (llama4)
sigmoid-groups  sigmoids; a correction, learnt outside the gradient to even the loads, is added for
                the choice alone; the best groups first (DeepSeek-V3, arXiv:2412.19437)
sparsemixer     one expert after the other, each weighed among its near rivals (phimoe)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, sigmoid, softmax

from attnlab.linear import Linear
from planner.layers import MoE

# Shapes.  N tokens · h hidden size · E experts · k experts per token


class Gate(Linear):
    """The router: a score for each expert, the weights and the picks of each token."""

    def __init__(self, moe: MoE, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, moe.num_experts, bias=moe.bias, dtype=dtype)
        self.moe = moe
        if moe.correction_bias:
            added = torch.zeros(1, moe.num_experts, dtype=dtype)
            self.e_score_correction_bias = nn.Parameter(added)
        elif moe.router == "sigmoid-groups":  # a buffer there, in float32
            added = torch.zeros(moe.num_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Buffer(added)

    def forward(self, x_Nh: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, in the dtype of x, and experts of each token, [N, k] both."""
        moe, k = self.moe, self.moe.num_experts_per_tok
        if moe.router == "sigmoid-groups":  # DeepSeek-V3 routes in float32
            bias = None if self.bias is None else self.bias.float()
            logits = linear(x_Nh.float(), self.weight.float(), bias)
            del bias
        else:
            logits = super().forward(x_Nh).float()
        if moe.router == "sparsemixer":
            weights, picks = sparsemixer(logits, k, moe.router_jitter_noise)
            return weights.to(x_Nh.dtype), picks
        scores = softmax(logits, dim=-1) if moe.router == "softmax" else sigmoid(logits)
        choice = logits.detach() if moe.router == "sigmoid" else scores.detach()
        del logits
        if hasattr(self, "e_score_correction_bias"):  # for the choice alone
            choice = choice + self.e_score_correction_bias.detach()
        if moe.n_group > 1:
            choice = within_best_groups(choice, moe)
        picks = choice.topk(k, dim=-1).indices
        del choice
        weights = scores.gather(-1, picks)
        del scores
        if moe.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if moe.routed_scaling_factor != 1.0:
            weights = weights * moe.routed_scaling_factor
        return weights.to(x_Nh.dtype), picks


def within_best_groups(choice_NE: Tensor, moe: MoE) -> Tensor:
    """−∞ outside the best `topk_group` of `n_group` groups, each judged by its best experts."""
    groups = choice_NE.unflatten(-1, (moe.n_group, -1))
    best = groups.topk(moe.group_best, dim=-1).values.sum(dim=-1)
    kept = best.topk(moe.topk_group, dim=-1).indices
    hidden = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
    return groups.masked_fill(hidden[..., None], -torch.inf).flatten(-2)


def sparsemixer(logits_NE: Tensor, k: int, noise: float) -> tuple[Tensor, Tensor]:
    """SparseMixer (arXiv:2409.12136) without its sampling: the best expert, then the next.

    Each one's weight is its softmax among those not farther than 2 · `noise` behind it.
    """
    weights, picks, left = [], [], logits_NE
    for _ in range(k):
        best, pick = left.detach().max(dim=-1, keepdim=True)
        behind = (best - logits_NE.detach()) / logits_NE.detach().abs().clamp(min=best)
        near = softmax(left.masked_fill(behind > 2 * noise, -torch.inf), dim=-1)
        weights.append(near.gather(-1, pick))
        picks.append(pick)
        left = left.scatter(-1, pick, -torch.inf)
    return torch.cat(weights, dim=-1), torch.cat(picks, dim=-1)
