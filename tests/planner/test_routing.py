"""How tokens are dealt out to experts, against picks that are drawn one by one."""

from dataclasses import replace

import numpy as np
import pytest

import planner
from planner import ConfigError, Deployment, Inference, Routing, Training
from planner.routing import routing_spec

DRAWS = 400
DEEPSEEK_V3, MIXTRAL, QWEN3 = (
    planner.load_model(name) for name in ("deepseek-v3", "mixtral-8x7b", "qwen3-30b-a3b")
)


def wanted(experts, top_k, skew):
    """The share of tokens that picks each: c · e^−skew, but none more than all; c by halving."""
    weights = 1.0 / np.arange(1, experts + 1) ** skew
    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        if np.minimum(1.0, middle * weights).sum() < top_k:
            low = middle
        else:
            high = middle
    return np.minimum(1.0, high * weights)


def drawn(rng, experts, top_k, skew, tokens):
    """Rows of every expert, [draws, experts]: each token has top_k different ones.

    One start and steps of 1 along the shares laid end to end (Madow, doi:10.1214/aoms/1177730246).
    """
    ends = np.cumsum(wanted(experts, top_k, skew))
    ends[-1] = top_k
    starts = rng.random((DRAWS, tokens, 1)) + np.arange(top_k)
    picks = np.minimum(np.searchsorted(ends, starts, side="right"), experts - 1)
    assert all(len(set(token)) == top_k for token in picks[0])
    return np.stack([np.bincount(one.ravel(), minlength=experts) for one in picks])


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "skew"),
    [(256, 8, 32, 0.0), (60, 4, 4, 0.0), (8, 2, 1, 0.7), (64, 6, 300, 1.0), (128, 8, 700, 0.5)],
)
def test_experts_and_tiles_are_as_many_as_random_picks_fill(experts, top_k, tokens, skew):
    rows = drawn(np.random.default_rng(1), experts, top_k, skew, tokens)
    routing = Routing(distribution="zipf", skew=skew) if skew else Routing()
    for seen, said in (
        ((rows > 0).sum(axis=1), routing.reached(experts, top_k, tokens)),
        (np.ceil(rows / 16).sum(axis=1), routing.tiles(experts, top_k, tokens, 16)),
        (np.ceil(rows / 64).sum(axis=1), routing.tiles(experts, top_k, tokens, 64)),
    ):
        chance = 4 * seen.std() / np.sqrt(DRAWS)
        assert abs(said - seen.mean()) <= chance + 2e-3 * seen.mean()
    fullest = rows.mean(axis=0).max() / rows.mean()
    assert routing.fullest(experts, top_k) == pytest.approx(fullest, rel=0.15)


def test_thirty_two_tokens_reach_163_of_256_experts():
    """256 · (1 − (1 − 8/256)³²), and all of them where they are dealt out in turn."""
    assert round(Routing().reached(256, 8, 32), 1) == 163.3
    assert Routing(distribution="balanced").reached(256, 8, 32) == 256
    assert Routing().reached(8, 2, 1) == 2


def test_picks_dealt_out_in_turn_fill_whole_tiles():
    """300 tokens, 2 experts each of 8: 75 rows an expert; 301: 2 experts have one more."""
    balanced = Routing(distribution="balanced")
    assert balanced.tiles(8, 2, 300, 64) == 16
    assert [balanced.tiles(8, 2, 256 + n, 64) for n in (0, 1, 4)] == [8, 10, 16]


def test_arrays_are_as_their_cells_and_skew_reaches_fewer():
    tokens = np.array([[1.0, 7.0], [64.0, 1e6]])
    for routing in (Routing(), Routing(distribution="zipf", skew=1.1)):
        for made in (
            lambda n, r=routing: r.reached(64, 6, n),
            lambda n, r=routing: r.tiles(64, 6, n, 64),
        ):
            one_by_one = [[made(n) for n in row] for row in tokens.tolist()]
            np.testing.assert_allclose(made(tokens), one_by_one, rtol=1e-13)
    reached = [
        Routing(distribution="zipf", skew=skew).reached(64, 6, 10) for skew in (0.0, 0.5, 1.0, 8.0)
    ]
    assert reached == sorted(reached, reverse=True)
    assert reached[0] == Routing().reached(64, 6, 10)
    assert Routing(distribution="zipf", skew=3.0).reached(4, 4, 1) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("zipf", "routing='zipf' is not understood"),
        ("zipf:much", "routing='zipf:much' is not understood"),
        ("zipf:-1", r"routing.skew=-1.0 is not allowed: 0 to 8"),
        ("zipf:nan", r"routing.skew=nan is not allowed"),
        ("uniform:1", r"routing.skew=1.0 is not allowed: 0 for 'uniform'"),
        ("even", "routing.distribution='even' is not allowed"),
    ],
)
def test_a_routing_that_says_nothing_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        routing_spec(given)


def of_step(routing, runtime="vllm"):
    work = Inference(batch=32, prompt_tokens=64, output_tokens=9, logits="last", routing=routing)
    deploy = Deployment(gpu="h200", runtime=runtime, tensor_parallel=8 if runtime == "vllm" else 1)
    return planner.estimate(DEEPSEEK_V3 if runtime == "vllm" else MIXTRAL, work, deploy)


def test_a_step_reads_the_experts_that_its_tokens_reach():
    """Of DeepSeek-V3: 58 layers, 3 · 7168 · 2048 weights of 2 bytes an expert, an eighth a GPU."""
    even, random = (
        e.op_times().query("family == 'grouped'")
        for e in (of_step(Routing(distribution="balanced")), of_step(Routing()))
    )
    read = [float((t["count"] * t["moved_bytes"]).sum()) for t in (even, random)]
    expert = 58 * 3 * 7168 * 2048 * 2 / 8
    assert read[0] - read[1] == pytest.approx((256 - 163.3) * expert, rel=2e-3)
    assert random["total_s"].sum() < 0.8 * even["total_s"].sum()


def test_a_tile_of_torch_s_is_computed_whole():
    """257 rows of each of 128 experts take as long as 512: two tiles of 256."""
    seconds = {}
    for tokens in (4096, 4112, 8192):
        work = Inference(
            batch=1, prompt_tokens=tokens, routing=Routing(distribution="balanced"), logits="last"
        )
        e = planner.estimate(QWEN3, work, Deployment(gpu="h200"))
        table = e.op_times("prefill").query("family == 'grouped'")
        seconds[tokens] = float(table["total_s"].sum())
    assert seconds[4112] == pytest.approx(seconds[8192], rel=1e-9)
    assert seconds[4112] > 1.4 * seconds[4096]


@pytest.mark.parametrize("runtime", ["vllm", "transformers", "attnlab"])
def test_memory_is_the_same_however_tokens_are_dealt_out(runtime):
    every = [Routing(), Routing(distribution="balanced"), Routing(distribution="zipf", skew=2.0)]
    made = [of_step(routing, runtime) for routing in every]
    assert len({e.memory.total_bytes for e in made}) == 1
    assert len({(e.memory.peak_live_bytes, e.memory.device_used_bytes) for e in made}) == 1
    assert len({e.latency.tpot_s for e in made}) == 3


def test_a_training_step_and_the_words_know_the_routing():
    work = Training(batch=1, sequence_tokens=8, routing=Routing(distribution="zipf", skew=1.0))
    skewed = planner.estimate(MIXTRAL, work, Deployment(gpu="h200"))
    even = planner.estimate(
        MIXTRAL, replace(work, routing=Routing(distribution="balanced")), Deployment(gpu="h200")
    )
    assert skewed.latency.step_s < even.latency.step_s
    assert "experts of 32 layers, zipf:1: of 8 a training step reaches 6.17" in skewed.explain()
    assert even.to_dict()["experts"][0]["step_reached"] == 8
    assert planner.estimate(planner.load_model("gpt2"), work, Deployment(gpu="h200")).experts == ()


def test_a_sweep_times_mixtures_by_their_routing():
    routing = Routing(distribution="zipf", skew=1.0)
    table = planner.sweep(
        "qwen3-30b-a3b", "h200", [1, 32], 1024, output_tokens=8, latency=True, routing=routing
    )
    for batch, tpot_s in zip(table["batch"], table["tpot_s"], strict=True):
        work = Inference(
            batch=int(batch), prompt_tokens=1017, output_tokens=8, logits="last", routing=routing
        )
        deploy = Deployment(gpu="h200", runtime="vllm")
        one = planner.estimate(QWEN3, work, deploy)
        assert tpot_s == pytest.approx(one.latency.tpot_s, rel=1e-12)
