"""What mixtures and scans call, issued for real."""

import pytest
import torch

from profiles.microbench import host_ops
from profiles.microbench.host_ops import host_time
from profiles.microbench.other_points import MORE_HOST_OPS
from profiles.microbench.point import OpPoint


@pytest.mark.parametrize("op", MORE_HOST_OPS)
def test_a_call_is_issued_and_clocked(op, monkeypatch):
    clocked = []
    monkeypatch.setattr(host_ops, "time_on_host", lambda call, *_, **__: clocked.append(call))
    host_time(OpPoint(family="host", op=op, shape={}, dtype="fp32"), torch.device("cpu"))
    clocked[0]()
