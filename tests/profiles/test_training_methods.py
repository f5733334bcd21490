"""Every way of training that is measured, run on a CPU with small models of the same types."""

import json
from dataclasses import replace

import pytest
import torch

import planner
from planner import ConfigError, LoRA, Training
from profiles import records
from profiles.compare import compare, estimate_of
from profiles.measurement import record_of
from profiles.points import SuitePoint, TrainingPoint
from profiles.suite_run import needed
from profiles.suites import suite_points
from profiles.training_bench import TrainingRun
from profiles.worker import measure
from profiles.workloads import build
from tests.profiles.made import ENVIRONMENT

DECODER = {
    "vocab_size": 500,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "dtype": "bfloat16",
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}
SMALL = {
    "bert": {
        "architectures": ["BertForMaskedLM"],
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "dtype": "float32",
    },
    "t5": {
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": 97,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 3,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    },
}
POINTS = suite_points("methods")


def config_of(kind):
    return {"model_type": kind, **SMALL.get(kind, DECODER)}


def made_small(point, folder):
    """The point with a model of its type and few tokens."""
    kind = planner.load_model(point.source).model_type
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(config_of(kind)))
    work = point.run.work
    work = replace(
        work,
        batch=2,
        sequence_tokens=24,
        encoder_tokens=work.encoder_tokens and 31,
        loss_chunk_tokens=work.loss_chunk_tokens and 10,
        frozen_layers=min(work.frozen_layers, 1),
    )
    run = replace(point.run, work=work, repeats=1)
    return replace(point, model=str(path), run=run)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_each_way_is_measured_and_is_what_the_planner_says_to_the_byte(point, tmp_path):
    if "adamw-8bit" in point.name or point.run.weight_dtype is not None:
        pytest.importorskip("bitsandbytes")
    record = measure(made_small(point, tmp_path), suite="methods", device="cpu")
    assert record.status == "ok"
    told = []
    rows = compare([records.from_json(records.to_json(record))], on_problem=told.append)
    found = {row.quantity: (row.predicted, row.measured) for row in rows}
    assert told == []
    assert found.pop("step_s")[1] > 0
    assert len(found) == 4
    assert all(predicted == seen for predicted, seen in found.values())


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_record_says_all_that_was_asked_for(point):
    model = planner.load_model(point.source)
    record = record_of(
        model,
        point.run,
        runtime=point.runtime,
        attention=point.attention,
        dtype=point.dtype or model.dtype,
        status="ok",
        seen={},
        env=ENVIRONMENT,
    )
    again = estimate_of(records.from_json(records.to_json(record)))
    asked = needed(point, "h200")
    assert again.work == asked.work
    assert again.memory == asked.memory
    assert asked.memory.peak_reserved_bytes < 0.9 * 139 * 2**30


@pytest.mark.parametrize(
    ("how", "runtime", "said"),
    [
        ({"padded": True}, "transformers", "padded=True is not measured"),
        ({"loss_chunk_tokens": 8}, "transformers", "loss_chunk_tokens=8 is measured in attnlab"),
        ({"method": "qlora"}, "transformers", "method='qlora' is measured with weight_dtype nf4"),
        ({"method": "adapter"}, "transformers", "method='adapter' is not allowed"),
        ({"precision": "master"}, "attnlab", "precision='master' is not measured in attnlab"),
        ({"frozen_layers": 1}, "attnlab", "frozen_layers=1 is not measured in attnlab"),
        ({"accumulation_steps": 2}, "attnlab", "accumulation_steps=2 is not measured in attnlab"),
        ({"method": "lora", "lora": LoRA(dora=True)}, "attnlab", "lora.dora=True is not measured"),
    ],
)
def test_what_is_not_measured_is_refused(how, runtime, said):
    model = planner.read_config(config_of("llama"))
    workload = build(
        model, runtime=runtime, attention=None, dtype="bf16", device=torch.device("cpu")
    )
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ConfigError, match=said):
        TrainingRun(workload, Training(batch=1, sequence_tokens=8, **how), ids)


def test_frozen_parts_of_an_encoder_are_refused():
    model = planner.read_config(config_of("bert"))
    workload = build(
        model, runtime="transformers", attention=None, dtype="fp32", device=torch.device("cpu")
    )
    work = Training(batch=1, sequence_tokens=8, frozen_layers=1)
    with pytest.raises(ConfigError, match="frozen parts of BertForMaskedLM are not measured"):
        TrainingRun(workload, work, torch.zeros(1, 8, dtype=torch.int64))


def test_a_name_tells_ways_apart():
    work = Training(batch=1, sequence_tokens=8, accumulation_steps=2, frozen=("head",))
    run = TrainingPoint(work=work, weight_dtype="nf4")
    point = SuitePoint(model="gpt2", run=run, split="held-out")
    assert point.name.endswith("nf4 weights, 2 batches a step, frozen head")
