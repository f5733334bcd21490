"""Training under torch's fully_shard: what one rank holds, to the byte, in small random models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from planner.autograd.gathering import COPIES, REDUCTIONS
from planner.cli.commands import main
from planner.training import training_phase
from planner.workload import RESHARDED
from tests.planner.sharded import fake_ranks, shard, shard_bytes, sharded_meter, state_bytes
from tests.planner.small_decoders import (
    CHECKPOINTING,
    EAGER_ONLY,
    built,
    checkpoint,
    decoders,
    described,
    takes_padding,
)
from tests.planner.steps import curve, events
from tests.properties import examples


@pytest.fixture(scope="module", autouse=True)
def ranks():
    with fake_ranks():
        yield


DTYPES = st.sampled_from(("fp32", "bf16"))
DEPLOYMENTS = st.builds(
    planner.Deployment,
    gpu=st.just("cpu"),
    dtype=DTYPES,
    weight_dtype=DTYPES,
    reduce_dtype=DTYPES,
    data_parallel_shards=st.integers(2, 16),
    reshard_after_forward=st.sampled_from(RESHARDED),
)


def layers_of(live):
    return next(m for m in live.modules() if isinstance(m, torch.nn.ModuleList))


def live_of(config, deploy, how=("none", 1)):
    """The class, sharded; and the deployment with its attention."""
    attention = "eager" if config["model_type"] in EAGER_ONLY else "sdpa"
    deploy = replace(deploy, attention=attention)
    live = built(described(config), deploy.weight_dtype, attention).train()
    checkpoint(live, how)
    shard(live, layers_of(live), deploy)
    return live, deploy


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # logits that are views
@examples(20, deadline=None)
@given(
    config=decoders(),
    deploy=DEPLOYMENTS,
    batch=st.integers(1, 3),
    tokens=st.integers(1, 30),
    how=CHECKPOINTING,
    padded=st.booleans(),
    steps=st.integers(1, 3),
)
def test_the_peak_of_a_sharded_step_is_exact(config, deploy, batch, tokens, how, padded, steps):
    padded = padded and takes_padding(config)
    live, deploy = live_of(config, deploy, how)
    meter = sharded_meter(live, batch, tokens, padded=padded, steps=steps)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer=None,
        checkpointing=how[0],
        checkpoint_every=how[1],
        padded=padded,
        accumulation_steps=steps,
    )
    memory = planner.estimate(planner.read_config(live.config.to_dict()), work, deploy).memory
    assert memory.weights_bytes == shard_bytes(live)
    assert memory.peak_live_bytes - memory.weights_bytes == meter.peak_bytes


LLAMA = {
    "model_type": "llama",
    "vocab_size": 130,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FULLY = planner.Deployment(
    gpu="cpu", dtype="bf16", weight_dtype="fp32", data_parallel_shards=4, attention="sdpa"
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "impl"),
    [
        ("adamw", "foreach"),
        ("adamw", "fused"),
        ("adamw", "for-loop"),
        ("sgd", "foreach"),
        ("sgd-momentum", "foreach"),
        ("sgd-momentum", "for-loop"),
    ],
)
def test_states_of_the_first_rank_and_its_step_are_exact(optimizer, impl, tied):
    live, deploy = live_of(LLAMA | {"tie_word_embeddings": tied}, FULLY)
    ways = {"foreach": impl == "foreach", "fused": impl == "fused"}
    if optimizer == "adamw":
        made = torch.optim.AdamW(live.parameters(), **ways)
    else:
        momentum = 0.9 if optimizer == "sgd-momentum" else 0.0
        made = torch.optim.SGD(live.parameters(), momentum=momentum, **ways)
    meter = sharded_meter(live, 1, 1, made)
    work = planner.Training(batch=1, sequence_tokens=1, optimizer=optimizer, optimizer_impl=impl)
    memory = planner.estimate(planner.read_config(live.config.to_dict()), work, deploy).memory
    assert memory.optimizer_bytes == state_bytes(made)
    held = memory.weights_bytes + memory.optimizer_bytes
    assert memory.peak_live_bytes - held == meter.peak_bytes
    assert memory.gradients_bytes == sum(
        p.to_local().untyped_storage().nbytes() for p in live.parameters()
    )


@pytest.mark.parametrize("reshards", RESHARDED)
def test_every_gather_and_reduction_is_made_where_fully_shard_makes_it(reshards):
    """In size, order and stream: torch.cpu has streams, too, that only their names tell apart."""
    live, deploy = live_of(LLAMA, replace(FULLY, reshard_after_forward=reshards))
    meter = sharded_meter(live, 2, 17)
    context = live._get_fsdp_state()._comm_ctx
    streams = {context.all_gather_copy_in_stream: COPIES, context.reduce_scatter_stream: REDUCTIONS}
    seen = [(size, streams[stream]) for size, stream in meter.made if stream in streams]
    program, dims = program_of(live, deploy)
    made = [
        (buffer.nbytes(dims), buffer.stream)
        for segment in program.segments
        for op in segment.ops * segment.count
        for buffer in op.allocates
        if buffer.stream
    ]
    assert made == seen
    assert {stream for _, stream in made} == {COPIES, REDUCTIONS}


def program_of(live, deploy):
    work = planner.Training(batch=2, sequence_tokens=17, optimizer=None)
    found = planner.estimate(planner.read_config(live.config.to_dict()), work, deploy)
    phase = training_phase(found.model, work, deploy, found.setting)
    return phase.program, phase.dims


def test_the_live_bytes_of_a_step_follow_the_class_from_gather_to_gather():
    """Beside what the class makes to look for packed sequences, which goes at once."""
    live, deploy = live_of(LLAMA, FULLY)
    meter = sharded_meter(live, 2, 17)
    program, dims = program_of(live, deploy)
    predicted = [point for _, point in curve(events(program, dims))]
    assert subsequence(predicted, [point for _, point in curve(meter.events)])


def subsequence(few, many):
    rest = iter(many)
    return all(point in rest for point in few)


REAL = planner.load_model("llama-3.1-8b")


def of(deploy=None, **work):
    given = {"gpu": "h100-80gb", "dtype": "bf16", "weight_dtype": "fp32", "data_parallel_shards": 8}
    step = planner.Training(**{"batch": 1, "sequence_tokens": 2048} | work)
    return planner.estimate(REAL, step, planner.Deployment(**given | (deploy or {})))


def test_states_shrink_with_the_shards_and_gathered_weights_do_not():
    eight, sixteen = (of({"data_parallel_shards": n}).memory for n in (8, 16))
    for part in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        assert getattr(sixteen, part) == pytest.approx(getattr(eight, part) / 2, rel=1e-6)
    assert eight.weights_bytes == pytest.approx(4 * REAL.parameter_count / 8, rel=1e-6)
    held = [
        dict((name, size) for name, _, size in of({"data_parallel_shards": n}).peak.buffers)
        for n in (8, 16)
    ]
    assert held[0]["unsharded weights"] == held[1]["unsharded weights"] > 2 * 128_256 * 4096


def test_layers_that_stay_gathered_hold_the_model_in_its_dtype():
    kept = of({"reshard_after_forward": "none"}).memory.activations_bytes
    freed = of().memory.activations_bytes
    layers = 2 * sum(p.count for p in REAL.parameters() if p.layer is not None)
    assert freed + 0.8 * layers < kept < freed + layers


def test_the_fewest_shards_fit_and_half_of_them_do_not():
    given = {"gpu": "h100-80gb", "dtype": "bf16", "weight_dtype": "fp32"}
    work = planner.Training(batch=1, sequence_tokens=2048, checkpointing="full")
    model = planner.load_model("llama-3.1-70b")
    n = planner.min_gpus(model, work, planner.Deployment(**given, data_parallel_shards=2))
    fits = {
        shards: planner.estimate(
            model, work, planner.Deployment(**given, data_parallel_shards=shards)
        ).fits
        for shards in (n // 2, n)
    }
    assert fits == {n // 2: False, n: True}


def test_torch_reserves_what_streams_keep_apart():
    memory = of().memory
    assert memory.peak_reserved_bytes > memory.peak_allocated_bytes > memory.peak_live_bytes


def test_the_ledger_says_which_gpu_is_counted_and_adds_up():
    estimate = of()
    assert "fullest of 8 GPUs: the first of 8 data-parallel shards" in estimate.explain()
    assert estimate.table()["bytes"].sum() == estimate.memory.total_bytes


def test_sharded_among_hosts_there_are_no_times():
    estimate = of({"data_parallel_shards": 16})
    assert estimate.latency.step_s is None
    assert "not planned: more than 8 shards" in estimate.explain().splitlines()[-1]
    with pytest.raises(ConfigError, match="data_parallel_shards=16: times not planned"):
        estimate.op_times()


@pytest.mark.parametrize(
    ("deploy", "work", "said"),
    [
        ({"runtime": "attnlab"}, {}, "data_parallel_shards=8 is not planned for runtime=attnlab"),
        ({"data_parallel_shards": 0}, {}, "data_parallel_shards=0 is not allowed"),
        ({"gpus": 4}, {}, "gpus=4 is not planned yet: tensor_parallel · pipeline_parallel · data"),
        ({"weight_dtype": "nf4"}, {}, "weight_dtype='nf4' is not allowed: one of fp32, bf16"),
        ({"reduce_dtype": "fp16"}, {}, "reduce_dtype='fp16' is not allowed: one of fp32, bf16"),
        (
            {"reshard_after_forward": 2},
            {},
            "reshard_after_forward=2 is not allowed: one of all, all-",
        ),
        ({}, {"method": "lora"}, "data_parallel_shards=8 is not planned with method='lora': full"),
        ({}, {"precision": "autocast"}, "not planned with precision='autocast': pure, with weight"),
        ({}, {"optimizer": "muon"}, "not planned with optimizer='muon': adamw, sgd or sgd-mom"),
        ({}, {"optimizer": "sgd", "optimizer_impl": "fused"}, "not planned with optimizer_impl="),
        ({"dtype": "fp16"}, {}, "not planned with dtype='fp16': bf16 or fp32"),
    ],
)
def test_what_is_not_planned_is_refused_in_one_line(deploy, work, said):
    with pytest.raises(ConfigError) as refused:
        of(deploy, **work)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_inference_and_other_classes_are_refused():
    deploy = planner.Deployment(gpu="h100-80gb", data_parallel_shards=8)
    with pytest.raises(ConfigError, match="data_parallel_shards=8 is not planned for inference"):
        planner.estimate(REAL, planner.Inference(batch=1, prompt_tokens=8), deploy)
    t5 = planner.read_config(
        hf.T5Config().to_dict() | {"architectures": ["T5ForConditionalGeneration"]}
    )
    step = planner.Training(batch=1, sequence_tokens=8)
    with pytest.raises(ConfigError, match="with model_type=t5: causal language models"):
        planner.estimate(t5, step, deploy)


def test_the_command_line_shards_a_step(capsys):
    asked = ["estimate", "llama-3.1-8b", "--gpu", "h100-80gb", "--train", "--sequence", "2048"]
    with pytest.raises(SystemExit) as ended:
        main([*asked, "--dtype", "bf16", "--weight-dtype", "fp32", "--shards", "8", "--json"])
    assert ended.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["data_parallel_shards"] == 8
    assert answer["memory"]["total_bytes"] == of().memory.total_bytes


LAYER, OP = {"checkpointing": "full", "checkpoint_every": 2}, {"checkpointing": "selective"}


@pytest.mark.parametrize(
    ("model", "batch", "how", "ran"),
    [
        ("llama-2-13b", 2, {}, True),
        ("llama-2-13b", 2, LAYER, True),
        ("llama-2-13b", 2, OP | {"keep_every": 2}, True),
        ("llama-2-70b", 2, LAYER, False),
        ("llama-2-70b", 2, OP | {"keep_every": 2}, False),
        ("llama-2-70b", 1, OP | {"keep_every": 2}, True),
        ("llama-2-70b", 2, {"checkpointing": "full"}, True),
    ],
)
def test_what_ran_on_64_a100s_fits_and_what_did_not_does_not(model, batch, how, ran):
    """torchtitan, docs/performance.md at 395a526: 4096 tokens, "OOM" in two of seven rows."""
    work = planner.Training(batch=batch, sequence_tokens=4096, **how)
    deploy = planner.Deployment(
        gpu="a100-80gb",
        dtype="bf16",
        weight_dtype="fp32",
        data_parallel_shards=64,
        reshard_after_forward="all-but-last",
    )
    assert planner.estimate(planner.load_model(model), work, deploy).fits == ran
