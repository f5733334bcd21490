import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from attnlab.relative import buckets


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (8, 12), (4, 1000)])
def test_buckets_are_those_of_t5(causal, count, farthest):
    distance = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(
        distance, bidirectional=not causal, num_buckets=count, max_distance=farthest
    )
    made = buckets(distance, count=count, max_distance=farthest, causal=causal)
    assert torch.equal(made, expected)
    assert made.min() == 0
    assert made.max() == count - 1
