import pytest
import torch

from attnlab.generate import generate, steps
from attnlab.growing import GrowingCache
from attnlab.kv_cache import FixedShapeCache, KVCache
from attnlab.sampling import Sampling, choose_tokens, probabilities
from planner import ConfigError
from tests.attnlab.test_caches import KINDS, cache_of

FAMILIES = ["llama", "mistral", "gpt2", "gemma2", "mamba2", "bamba", "qwen3_next"]


def their_greedy(theirs, ids, tokens, **settings):
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    return theirs.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0, eos_token_id=None, **settings,
    )[:, ids.shape[1] :]  # fmt: skip


def margins(ours, sequence, prompt_tokens):
    """How far the likeliest logit stands above the second at every generated token."""
    top = ours(sequence)[:, prompt_tokens - 1 : -1].topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def assert_same_tokens(ours, prompt, ours_out, expected):
    """Equal wherever rounding cannot turn the choice, which it must not until then."""
    clear = margins(ours, torch.cat((prompt, expected), 1), prompt.shape[1]) > 1e-4
    for row, theirs, sure in zip(ours_out, expected, clear, strict=True):
        end = len(sure) if sure.all() else int((~sure).nonzero()[0])
        assert end > 0
        assert torch.equal(row[:end], theirs[:end])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_those_of_transformers(pairs, ids, family, kind):
    theirs, ours = pairs(family)
    cache = cache_of(kind, ours.model, tokens=13 + 12 - 1)
    out = generate(ours, ids, output_tokens=12, cache=cache)
    assert_same_tokens(ours, ids, out, their_greedy(theirs, ids, 12))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fixed shapes"])
def test_unequal_prompts_equal_left_padded_ones_of_transformers(pairs, ids, family, kind, chunk):
    theirs, ours = pairs(family)
    prompts = [ids[0, :4], ids[1]]
    padded, mask = torch.zeros(2, 13, dtype=torch.long), torch.zeros(2, 13, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        padded[b, 13 - len(prompt) :], mask[b, 13 - len(prompt) :] = prompt, 1
    expected = their_greedy(theirs, padded, 9, attention_mask=mask)
    out = generate(
        ours, prompts, output_tokens=9, cache=cache_of(kind, ours.model), prefill_chunk_tokens=chunk
    )
    for b, prompt in enumerate(prompts):
        assert_same_tokens(ours, prompt[None], out[b : b + 1], expected[b : b + 1])


def test_generate_equals_repeated_full_passes(pair, ids):
    _, ours = pair
    longer = ids
    for _ in range(6):
        longer = torch.cat((longer, ours(longer)[:, -1:].argmax(-1)), dim=1)
    assert_same_tokens(ours, ids, generate(ours, ids, output_tokens=6), longer[:, 13:])


def test_the_cache_ends_one_short_of_all_tokens(llama_pair, ids):
    _, ours = llama_pair
    cache = KVCache(ours.model, batch=2, capacity_tokens=16, dtype=torch.float32, device="cpu")
    tokens = list(steps(ours, ids, 4, cache))
    assert [t.shape for t in tokens] == [(2, 1)] * 4
    assert cache.length == 13 + 4 - 1
    cache.reset()
    assert torch.equal(generate(ours, ids, output_tokens=4, cache=cache), torch.cat(tokens, 1))


def test_a_stopped_sequence_repeats_its_stop_token_until_all_have_stopped(llama_pair, ids):
    _, ours = llama_pair
    free = generate(ours, ids, output_tokens=10).tolist()
    first, second = free[0][2], free[1][5]
    stops = {first, second}
    out = generate(ours, ids, output_tokens=10, stop_tokens=stops).tolist()
    ends = [next((i for i, t in enumerate(row) if t in stops), 9) for row in free]
    assert len(out[0]) == max(ends) + 1
    for row, whole, end in zip(out, free, ends, strict=True):
        assert row == whole[: end + 1] + [whole[end]] * (max(ends) - end)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    p = torch.softmax(logits, -1)[0]
    assert probabilities(logits, Sampling(top_k=2))[0].nonzero().flatten().tolist() == [0, 2]
    for reach, kept in ((0.3, [0]), (0.65, [0, 2]), (0.9, [0, 1, 2]), (1.0, [0, 1, 2, 3])):
        cut = probabilities(logits, Sampling(top_p=reach))[0]
        assert cut.nonzero().flatten().tolist() == kept
        torch.testing.assert_close(cut[kept], p[kept] / p[kept].sum())
    cold = probabilities(logits, Sampling(temperature=0.5))
    torch.testing.assert_close(cold, torch.softmax(logits / 0.5, -1))


@pytest.mark.parametrize("settings", [dict(top_k=5), dict(top_p=0.6), dict(temperature=0.7)])
def test_cut_distributions_equal_those_of_transformers(settings):
    from transformers.generation import logits_process as theirs

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    name, value = next(iter(settings.items()))
    kind = {
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "temperature": theirs.TemperatureLogitsWarper,
    }[name]
    expected = kind(value)(None, logits).softmax(-1)
    torch.testing.assert_close(probabilities(logits, Sampling(**settings)), expected)


def test_sampled_frequencies_follow_the_probabilities():
    """Chi-square of 20 000 draws over 8 tokens: below its 99.9 % quantile at 7 degrees, 24.3."""
    logits = torch.linspace(-1, 1, 8)
    draws = choose_tokens(
        logits.expand(20_000, 8), Sampling(temperature=0.8), torch.Generator().manual_seed(0)
    )
    expected = 20_000 * torch.softmax(logits / 0.8, -1)
    seen = torch.bincount(draws.flatten(), minlength=8)
    assert ((seen - expected) ** 2 / expected).sum() < 24.3


def test_the_same_generator_gives_the_same_tokens(llama_pair, ids):
    _, ours = llama_pair
    out = [
        generate(
            ours, ids, output_tokens=8, sampling=Sampling(temperature=2.0),
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])


def test_a_fixed_shape_step_compiles_once_and_needs_no_other_graph(llama_pair, ids):
    _, ours = llama_pair
    cache = FixedShapeCache(
        ours.model, batch=2, capacity_tokens=24, dtype=torch.float32, device="cpu"
    )
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(transformer, ids, cache):
        return transformer(ids, cache=cache, logits="last")[:, 0]

    compiled = torch.compile(step, backend=count, fullgraph=True, dynamic=False)
    out = generate(ours, ids, output_tokens=12, cache=cache, decode=compiled)
    assert len(graphs) == 1
    assert torch.equal(out, generate(ours, ids, output_tokens=12))


def test_a_fixed_shape_cache_takes_over_a_prefill(llama_pair, ids):
    _, ours = llama_pair
    settings = dict(batch=2, dtype=torch.float32, device="cpu")
    prefilled = KVCache(ours.model, capacity_tokens=13, **settings)
    ours(ids, cache=prefilled, tokens=[13, 6])
    fixed = FixedShapeCache(ours.model, capacity_tokens=20, **settings)
    fixed.take(prefilled)
    next_ids = torch.tensor([[5], [7]])
    out = ours(next_ids, cache=fixed)
    for b, n in enumerate([13, 6]):
        alone = ours(torch.cat((ids[b : b + 1, :n], next_ids[b : b + 1]), dim=1))
        torch.testing.assert_close(out[b, 0], alone[0, -1], rtol=1e-4, atol=2e-5)


def test_bad_calls_are_rejected(llama_pair, ids):
    _, ours = llama_pair
    settings = dict(batch=2, capacity_tokens=13, dtype=torch.float32, device="cpu")
    with pytest.raises(ConfigError, match="13 cached"):
        generate(ours, ids, output_tokens=2, cache=KVCache(ours.model, **settings))
    with pytest.raises(ConfigError, match="14 tokens do not fit capacity_tokens=13"):
        generate(ours, ids, output_tokens=2, cache=FixedShapeCache(ours.model, **settings))
    with pytest.raises(ConfigError, match=r"ids \[13\] of torch.int64 are not allowed"):
        generate(ours, ids[0], output_tokens=2)
    with pytest.raises(ConfigError, match="output_tokens=0 is not allowed"):
        generate(ours, ids, output_tokens=0)
    with pytest.raises(ConfigError, match="stop_tokens has 97: an id from 0 to 96"):
        generate(ours, ids, output_tokens=2, stop_tokens=[97])
    with pytest.raises(ConfigError, match="ids outside the vocabulary: 0 to 96"):
        generate(ours, ids + 97, output_tokens=2)
    for bad in ([[1, 2], []], [[1.5]], [[True]], ["abc"], [[[1]]], []):
        with pytest.raises(ConfigError, match="prompts"):
            generate(ours, bad, output_tokens=2)
    for bad in (dict(temperature=0.0), dict(top_k=0), dict(top_p=1.5)):
        with pytest.raises(ConfigError, match=f"{next(iter(bad))}=.* is not allowed"):
            Sampling(**bad)


def test_generation_stops_at_the_end_of_a_learned_table(pairs):
    ours = pairs("gpt2")[1]
    cache = GrowingCache(ours.model, batch=1, dtype=torch.float32, device="cpu")
    with pytest.raises(ConfigError, match="= 65 reaches beyond max_position_embeddings=64"):
        generate(ours, torch.zeros(1, 60, dtype=torch.long), output_tokens=6, cache=cache)
