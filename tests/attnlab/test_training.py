import pytest
import torch

from attnlab.caches import build_cache
from attnlab.training import IGNORED, next_token_loss, training_step
from attnlab.transformer import Transformer
from planner import CacheSpec, ConfigError

CLOSE = dict(rtol=1e-4, atol=1e-5)  # float32


@pytest.fixture
def trained(pair):
    """The model of transformers, and ours with the same weights and gradients wanted."""
    theirs, ours = pair
    other = Transformer(ours.model, attention="naive", dtype=torch.float32, device="cpu")
    other.load_state_dict(ours.state_dict())
    theirs.zero_grad()
    return theirs, other


def shifted(ids):
    """The token after each, none after the last."""
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)


def test_loss_and_gradients_equal_those_of_transformers(trained, ids):
    theirs, ours = trained
    ids = ids.masked_fill(ids == 1, 2)  # opt's padding, whose row has no gradient there
    expected = theirs(ids, labels=ids).loss
    expected.backward()
    torch.testing.assert_close(training_step(ours, ids, shifted(ids)), expected.detach(), **CLOSE)
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    made = {name: p.grad for name, p in ours.named_parameters()}
    for here, there in zip(
        ours.model.parameters(), ours.model.checkpoint_parameters(), strict=True
    ):
        gradient = wanted[there.name]
        turned = there.transposed and not here.transposed  # experts may lie so in both
        gradient = gradient.T if turned else gradient
        torch.testing.assert_close(made[here.name], gradient, **CLOSE)


@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_checkpointing_changes_no_gradient(llama_pair, ids, attention):
    ours = Transformer(llama_pair[1].model, attention=attention, dtype=torch.float32, device="cpu")
    losses, gradients = [], []
    for checkpointing in ("none", "full"):
        losses.append(training_step(ours, ids, shifted(ids), checkpointing=checkpointing))
        gradients.append([p.grad for p in ours.parameters()])
        ours.zero_grad(set_to_none=True)
    assert torch.equal(*losses)
    assert all(map(torch.equal, *gradients))


def test_checkpointing_with_a_cache_is_refused(llama_pair, ids):
    ours = llama_pair[1]
    cache = build_cache(
        ours.model,
        CacheSpec(kind="static"),
        batch=len(ids),
        tokens=99,
        dtype=torch.float32,
        device="cpu",
    )
    with pytest.raises(ConfigError, match="checkpointing=full is not allowed with a cache: none"):
        ours(ids, cache=cache, checkpointing="full")


def test_an_optimizer_moves_the_weights_and_leaves_no_gradients(llama_pair, ids):
    torch.manual_seed(0)
    ours = Transformer(llama_pair[1].model, dtype=torch.float32, device="cpu")
    before = [p.detach().clone() for p in ours.parameters()]
    sgd = torch.optim.SGD(ours.parameters(), lr=1.0)
    losses = [training_step(ours, ids, shifted(ids), sgd) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in ours.parameters())
    assert not any(map(torch.equal, before, ours.parameters()))


def test_ignored_labels_count_for_nothing():
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[2, IGNORED, 4]])
    expected = -logits.log_softmax(-1)[0, [0, 2], [2, 4]].mean()
    torch.testing.assert_close(next_token_loss(logits, labels), expected)
