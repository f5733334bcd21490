"""How far bfloat16 may be from float32: about as far as transformers' class is."""

from __future__ import annotations

import torch


def in_bfloat16(theirs):
    """The module of transformers again, with its weights rounded."""
    copy = type(theirs)(theirs.config).to(torch.bfloat16).eval()
    copy.load_state_dict(theirs.state_dict())
    return copy


def assert_as_near(rounded, theirs, exact):
    """Both round at every step, in places of their own: ours may not be much worse."""
    assert rounded.dtype == torch.bfloat16
    their_error = (theirs.float() - exact).square().mean().sqrt()
    error = (rounded.float() - exact).square().mean().sqrt()
    assert error <= 1.5 * their_error + 1e-3
