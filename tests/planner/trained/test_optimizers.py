"""Optimizers' states and steps against the real ones, every allocation of them."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf

import planner
from planner.program import Dims
from planner.runtimes.transformers_code.forward import pass_program
from planner.runtimes.transformers_code.regime import Pass, Regime
from planner.trained.optimizer_parts import is_hidden
from profiles.meters import LiveTensorMeter, storage_bytes
from tests.attnlab.families import FAMILIES
from tests.pairs import every_pair
from tests.planner.small_decoders import EAGER_ONLY, built, described, words
from tests.planner.steps import curve

WAYS = (
    ("sgd-momentum", "foreach"),
    ("sgd-momentum", "fused"),
    ("adamw-8bit", "foreach"),
    ("adafactor", "foreach"),
    ("adafactor", "for-loop"),
    ("adafactor-transformers", "foreach"),
    ("muon", "foreach"),
    ("muon", "for-loop"),
)
MIXTRAL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_local_experts": 4,
}


EVERY_WAY = (
    *((name, impl) for name in ("adamw", "sgd") for impl in ("foreach", "fused", "for-loop")),
    *WAYS,
    ("muon", "fused"),
)


class Together:
    """Two optimizers, one step after the other."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    @property
    def state(self):
        return {p: kept for one in self.optimizers for p, kept in one.state.items()}


def real(name, impl, live):
    parameters = list(live.parameters())
    ways = {"foreach": impl == "foreach", "fused": impl == "fused"}
    match name:
        case "adamw":
            return torch.optim.AdamW(parameters, **ways)
        case "sgd":
            return torch.optim.SGD(parameters, **ways)
        case "sgd-momentum":
            return torch.optim.SGD(parameters, momentum=0.9, **ways)
        case "adafactor":
            return torch.optim.Adafactor(parameters, foreach=ways["foreach"])
        case "adafactor-transformers":
            given = {"lr": 1e-3, "scale_parameter": False, "relative_step": False}
            return hf.Adafactor(parameters, **given)
        case "adamw-8bit":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bitsandbytes = pytest.importorskip("bitsandbytes")
            return bitsandbytes.optim.AdamW8bit(parameters)
    inside = {
        id(p)
        for n, p in live.named_parameters()
        if is_hidden(p.shape, 0 if ".layers." in n or ".h." in n else None)
    }
    hidden = [p for p in parameters if id(p) in inside]
    others = [p for p in parameters if id(p) not in inside]
    return Together(torch.optim.Muon(hidden), torch.optim.AdamW(others, **ways))


def optimizer_events(program, dims):
    changes = []
    for segment in program.segments:
        for op in segment.ops * segment.count if segment.phase == "optimizer step" else ():
            changes += [(op.kernel, b.nbytes(dims)) for b in op.allocates if b.nbytes(dims)]
            changes += [(op.kernel, -b.nbytes(dims)) for b in op.frees]
    return changes


@every_pair(
    way=WAYS,
    dtype=("bf16", "fp32"),
    family=("llama", "gpt2", "gemma2", "olmo", "mixtral", "stablelm"),
)
def test_states_and_every_allocation_of_a_step_are_exact(way, dtype, family):
    name, impl = way
    config = hf.MixtralConfig(**MIXTRAL) if family == "mixtral" else FAMILIES[family]()
    attention = "eager" if family in EAGER_ONLY else "sdpa"
    live = built(described(config.to_dict()), dtype, attention).train()
    optimizer = real(name, impl, live)
    ids = words(live.config, 1, 2)
    with LiveTensorMeter(log=True) as meter:
        for _ in ("states", "step"):
            live(ids, labels=ids, use_cache=False).loss.backward()
            before, start = len(meter.events), meter.live_bytes
            meter.reset_peak()
            optimizer.step()
            top, seen = meter.peak_bytes - start, meter.events[before:]
            live.zero_grad(set_to_none=True)
    tensors = (t for kept in optimizer.state.values() for t in kept.values())
    held = storage_bytes(t for t in tensors if isinstance(t, torch.Tensor))
    model = planner.read_config(live.config.to_dict())
    work = planner.Training(batch=1, sequence_tokens=2, optimizer=name, optimizer_impl=impl)
    deploy = planner.Deployment(gpu="cpu", dtype=dtype, attention=attention)
    assert planner.estimate(model, work, deploy).memory.optimizer_bytes == held
    what = {"attention": attention, "dtype": dtype, "optimizer": name, "optimizer_impl": impl}
    dims = Dims(batch=1, tokens=2, context=2)
    step = Pass(kind="training", device="cpu", **what)
    ours = optimizer_events(pass_program(model, step, Regime.of(model, dims)), dims)
    assert max((size for _, size in curve(ours)), default=0) == top
    if "fused" not in impl:
        made = sorted(size for _, size in ours if size > 0)
        assert made == sorted(size for op, size in seen if size > 0 and op != "lift_fresh")


def test_tensors_large_enough_have_moments_of_a_byte():
    """bitsandbytes: 2 bytes an element and two float32 scales for 256, below 4 096 eight bytes."""
    model = planner.load_model("llama-3.1-8b")
    work = planner.Training(batch=1, sequence_tokens=8, optimizer="adamw-8bit")
    memory = planner.estimate(model, work, planner.Deployment(gpu="h200")).memory
    assert memory.optimizer_bytes == pytest.approx(model.parameter_count * (2 + 8 / 256), rel=1e-5)


def test_adafactor_holds_next_to_nothing():
    """arXiv:1804.04235: rows + columns of a matrix."""
    model = planner.load_model("llama-3.1-8b")
    work = planner.Training(batch=1, sequence_tokens=8, optimizer="adafactor")
    memory = planner.estimate(model, work, planner.Deployment(gpu="h200")).memory
    assert memory.optimizer_bytes < 0.001 * memory.weights_bytes


@pytest.mark.parametrize("optimizer", [name for name, impl in WAYS if impl == "foreach"])
def test_an_allocator_plays_the_states_of_each(optimizer):
    model = planner.load_model("llama-3.2-1b")
    work = planner.Training(batch=1, sequence_tokens=64, optimizer=optimizer)
    memory = planner.estimate(model, work, planner.Deployment(gpu="h200")).memory
    live = memory.peak_live_bytes
    assert live < memory.peak_allocated_bytes < 1.02 * live + 80 * 2**20
    assert memory.peak_reserved_bytes >= memory.peak_allocated_bytes


def test_adapters_are_muons():
    work = planner.Training(batch=1, sequence_tokens=8, optimizer="muon", method="lora")
    estimate = planner.estimate(
        planner.load_model("llama-3.2-1b"), work, planner.Deployment(gpu="h200")
    )
    assert [row.item for row in estimate.rows if row.component == "optimizer"] == [
        "momentum of Muon"
    ]


def test_a_fused_adafactor_is_refused():
    with pytest.raises(planner.ConfigError, match="optimizer_impl='fused' is not what optimizer="):
        planner.Training(batch=1, sequence_tokens=8, optimizer="adafactor", optimizer_impl="fused")
