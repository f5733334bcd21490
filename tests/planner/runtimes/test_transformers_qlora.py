"""Adapters beside bitsandbytes' 4-bit weights: peaks to the byte, over random small decoders."""

from __future__ import annotations

import warnings
from dataclasses import replace

import peft
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig
from transformers.quantizers.base import HfQuantizer

import planner
from planner import ConfigError
from planner.allocator import Alloc, DeviceAllocator, Free
from planner.allocator.settings import DEFAULTS
from planner.allocator.simulate import Replay
from planner.catalog.gpus import gpu_named
from planner.prepared import prepare
from planner.reserved import AllocatorPlan, weight_events
from planner.training import training_phase
from planner.training_events import TRAINING_STEPS
from profiles.meters import LiveTensorMeter
from tests.attnlab.families import FAMILIES
from tests.planner.quantization.test_packed_products import chosen
from tests.planner.runtimes.test_transformers_lora import adapted_decoders, with_adapters
from tests.planner.small_decoders import (
    CHECKPOINTING,
    EAGER_ONLY,
    NO_TOKENS,
    built,
    checkpoint,
    described,
    words,
)
from tests.properties import examples

pytest.importorskip("bitsandbytes")
LLAMA = planner.load_model("llama-3.1-8b")
SIZES = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
"""Its linear layers, [out, in]."""
POST_NORM = {
    "model_type": "olmo2",
    "vocab_size": 3,
    "tie_word_embeddings": False,
    **NO_TOKENS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 2,
    "max_position_embeddings": 128,
}
"""Its first linear layers take the embeddings as they are, whose cast autocast caches."""


OUTPUTS = ("lm_head", "embed_out")
SKIPPED = (
    "o_proj", "down_proj", "dense", "c_proj", "fc2", "self_attn", "model.layers.0",
    "model.layers.1.mlp", "layers.2", "transformer.h.1", "gpt_neox.layers.0.attention",
)  # fmt: skip
"""What a config may name besides the head, of one family or another."""


class FourBitMeter(LiveTensorMeter):
    """A meter that looks into bitsandbytes' ops, which are Python down to their kernels."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run what the op is made of inside the meter."""
        name = func.name()
        if not name.startswith("bitsandbytes::"):
            return super().__torch_dispatch__(func, types, args, kwargs)
        keys = torch._C.DispatchKey
        key = keys.CompositeExplicitAutograd if name.endswith("gemm_4bit") else keys.CPU
        with self:
            return func._op_dk(key, *args, **(kwargs or {}))


class TracingMeter(FourBitMeter):
    """A meter that writes down what an allocator would be asked for."""

    def __init__(self):
        super().__init__()
        self.trace, self.names, self.made = [], {}, 0

    def _created(self, key, storage):
        super()._created(key, storage)
        self.made += 1
        self.names[key] = self.made
        self.trace.append(Alloc(self.made, storage.nbytes()))

    def _released(self, key, gone):
        if key in self._sizes and self._sizes[key][0] is gone:
            self.trace.append(Free(self.names[key]))
        super()._released(key, gone)


def quantised(live, *, double_quant, prepared, quant_type="nf4", skipped=None):
    """The class with linear layers that bitsandbytes has quantised, as from_pretrained does it."""
    from transformers.integrations import bitsandbytes as integration

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skipped,
    )
    before = dict(live.named_parameters())
    skipped = HfQuantizer.get_modules_to_not_convert(live, skipped, live._keep_in_fp32_modules)
    torch.set_default_dtype(torch.bfloat16)  # as from_pretrained does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        integration.replace_with_bnb_linear(live, skipped, config)
    torch.set_default_dtype(torch.float32)
    quantise = integration.Bnb4bitQuantize(None)
    for name, module in live.named_modules():
        if hasattr(module, "source_cls"):
            weight = f"{name}.weight"
            made = quantise.convert({weight: before[weight].detach()}, model=live)
            module.weight = made[weight]
            if module.bias is not None:
                module.bias = before[f"{name}.bias"]
    live.is_loaded_in_4bit = live.is_quantized = True
    live.quantization_method = "bitsandbytes"
    if prepared:
        peft.prepare_model_for_kbit_training(live, use_gradient_checkpointing=False)
    return live


def saying(config, double_quant, skipped):
    """A checkpoint's own config of fp4 weights."""
    method = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_skip_modules": skipped,
    }
    return planner.read_config({**config.to_dict(), "quantization_config": method})


def has_plain(config):
    """Whether bitsandbytes leaves linear layers of the blocks alone."""
    tied = config["model_type"] == "olmo" and config["tie_word_embeddings"]
    return tied or config["model_type"] == "falcon"


def held_bytes(live):
    """Parameters, buffers and what quantised ones have beside them, each storage once."""
    tensors = [*live.parameters(), *live.buffers()]
    for p in live.parameters():
        state = getattr(p, "quant_state", None)
        while state is not None:
            tensors += [t for t in (state.absmax, state.code, state.offset) if t is not None]
            state = state.state2
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def step_meter(live, batch, tokens, optimizer=None, *, autocast=False):
    return step(live, batch, tokens, FourBitMeter(), optimizer, autocast=autocast)


def step(live, batch, tokens, meter, optimizer=None, *, autocast=False):
    ids = words(live.config, batch, tokens)
    with meter:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = live(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        live.zero_grad(set_to_none=True)
        del loss
    return meter


@examples(20, fuzz=30)
@given(
    adapted=adapted_decoders(),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    eager=st.booleans(),
    how=CHECKPOINTING,
    double_quant=st.booleans(),
    prepared=st.booleans(),
    autocast=st.booleans(),
    skipped=st.none() | st.sampled_from(SKIPPED),
)
@example(
    adapted=(POST_NORM, planner.LoRA(rank=1, targets=("q_proj", "k_proj", "gate_proj"))),
    batch=1,
    tokens=1,
    eager=False,
    how=("full", 1),
    double_quant=False,
    prepared=True,
    autocast=True,
    skipped=None,
)
def test_the_peak_of_a_step_is_exact(
    adapted, batch, tokens, eager, how, double_quant, prepared, autocast, skipped
):
    config, lora = adapted
    assume(how[0] != "selective" or config.get("clip_qkv") is None)  # refused
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), "bf16", attention)
    model = planner.read_config(live.config.to_dict())
    assume(not any(p.shape[-1] % 2 for p in model.checkpoint_parameters() if p.linear))
    method = "qlora" if prepared else "lora"
    if prepared and (skipped is not None or has_plain(config)):
        lora = replace(lora, dtype=None)  # refused
    if skipped is None:
        live = quantised(live, double_quant=double_quant, prepared=prepared)
        weight_dtype = "nf4-double" if double_quant else "nf4"
    else:  # as a checkpoint says it, in fp4
        names = [*OUTPUTS, skipped]
        kinds = {"quant_type": "fp4", "skipped": names}
        live = quantised(live, double_quant=double_quant, prepared=prepared, **kinds)
        model = saying(live.config, double_quant, names)
        weight_dtype = None
    checkpoint(live, how)
    live = with_adapters(live, lora)
    step_meter(live, batch, tokens, autocast=autocast)  # casts biases
    meter = step_meter(live, batch, tokens, autocast=autocast)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer=None,
        method=method,
        lora=lora,
        precision="autocast" if autocast else "pure",
        checkpointing=how[0],
        checkpoint_every=how[1],
    )
    deploy = planner.Deployment(
        gpu="cpu",
        dtype="bf16",
        attention=attention,
        weight_dtype=weight_dtype,
    )
    memory = planner.estimate(model, work, deploy).memory
    assert memory.weights_bytes == held_bytes(live)
    assert memory.peak_live_bytes - memory.weights_bytes == meter.peak_bytes


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_a_step_with_adamw_adds_up(name, double_quant):
    lora, config = planner.LoRA(rank=3), described(FAMILIES[name]().to_dict())
    live = quantised(built(config, "bf16", "sdpa"), double_quant=double_quant, prepared=True)
    live = with_adapters(live, lora)
    trained = [p for p in live.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, foreach=True)
    step_meter(live, 2, 30, adamw)  # makes the states
    meter = step_meter(live, 2, 30, adamw)
    states = sum(value.nbytes for state in adamw.state.values() for value in state.values())
    work = planner.Training(batch=2, sequence_tokens=30, method="qlora", lora=lora)
    kind = "nf4-double" if double_quant else "nf4"
    deploy = planner.Deployment(gpu="cpu", dtype="bf16", attention="sdpa", weight_dtype=kind)
    memory = planner.estimate(planner.read_config(config.to_dict()), work, deploy).memory
    assert memory.optimizer_bytes == states
    assert memory.gradients_bytes == sum(p.nbytes for p in trained)
    assert memory.peak_live_bytes == held_bytes(live) + states + meter.peak_bytes


WIDE = {
    "model_type": "llama",
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    **NO_TOKENS,
}


@pytest.mark.parametrize(
    ("optimizer", "autocast", "double_quant", "checkpointing"),
    [
        (None, False, False, "none"),
        (None, True, True, "full"),
        ("adamw", True, False, "none"),
        ("adamw", False, True, "full"),
    ],
)
def test_allocated_and_reserved_are_those_of_the_classes_requests(
    optimizer, autocast, double_quant, checkpointing
):
    """The live steps' storages, played through the allocator behind the same weights."""
    lora = planner.LoRA(rank=8)
    live = built(described(WIDE), "bf16", "sdpa")
    model = planner.read_config(live.config.to_dict())
    live = quantised(live, double_quant=double_quant, prepared=True)
    checkpoint(live, (checkpointing, 1))
    live = with_adapters(live, lora)
    trained = [p for p in live.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, foreach=True) if optimizer else None
    meter = TracingMeter()
    for _ in range(TRAINING_STEPS if optimizer else 1):
        step(live, 2, 150, meter, adamw, autocast=autocast)
    work = planner.Training(
        batch=2,
        sequence_tokens=150,
        optimizer=optimizer,
        method="qlora",
        lora=lora,
        precision="autocast" if autocast else "pure",
        checkpointing=checkpointing,
    )
    kind = "nf4-double" if double_quant else "nf4"
    deploy = planner.Deployment(gpu="cpu", dtype="bf16", attention="sdpa", weight_dtype=kind)
    e = planner.estimate(model, work, deploy)
    plan = AllocatorPlan(
        model=e.model,
        work=work,
        setting=e.setting,
        runtime="transformers",
        workspace_bytes=0,
        capacity_bytes=2**40,
    )
    replay = Replay(DeviceAllocator(DEFAULTS, capacity_bytes=2**40))
    replay.feed(weight_events(plan))
    replay.feed([Alloc(name, 8 * 2 * 150) for name in ("token ids", "labels")])
    replay.feed(meter.trace)
    assert plan.peak_allocated_bytes == replay.stats().peak_allocated_bytes
    assert plan.peak_reserved_bytes == replay.stats().peak_reserved_bytes


def test_what_a_gpu_reserves_is_known():
    work = planner.Training(batch=1, sequence_tokens=512, method="qlora", precision="autocast")
    deploy = planner.Deployment(gpu="h200", dtype="bf16", weight_dtype="nf4-double")
    e = planner.estimate(LLAMA, work, deploy)
    assert e.memory.peak_live_bytes < e.memory.peak_allocated_bytes
    assert e.memory.peak_allocated_bytes <= e.memory.peak_reserved_bytes
    assert "without what quantising on loading left cached" in e.reserved_note


def test_a_head_of_4_bits_is_refused():
    model = saying(described(WIDE), double_quant=False, skipped=["o_proj"])
    work = planner.Training(batch=1, sequence_tokens=8, method="qlora")
    with pytest.raises(ConfigError, match="llm_int8_skip_modules that does not name the head"):
        planner.estimate(model, work, planner.Deployment(gpu="cpu", dtype="bf16"))


def test_adapters_in_bf16_beside_float32_layers_are_refused():
    """peft makes each adapter's dtype that of its layer, or of what a 4-bit one computes in."""
    model = planner.read_config({"model_type": "olmo", "tie_word_embeddings": True})
    lora = planner.LoRA(targets=("down_proj",), dtype="bf16")
    work = planner.Training(batch=1, sequence_tokens=8, method="qlora", lora=lora)
    deploy = planner.Deployment(gpu="cpu", dtype="bf16", weight_dtype="nf4")
    with pytest.raises(ConfigError, match="beside layers that are not quantised"):
        planner.estimate(model, work, deploy)


@pytest.mark.parametrize("gpu", ["h200", "a100-80gb", "rtx-4090"])
@pytest.mark.parametrize("tokens", [4, 16, 64, 128, 2048])
def test_a_gpu_makes_the_weights_in_a_forward_where_the_library_does(gpu, tokens):
    device = gpu_named(gpu).compute_capability, gpu_named(gpu).multiprocessors
    whole = {name for name, sizes in SIZES.items() if not chosen(tokens, *sizes, *device)}
    work = planner.Training(
        batch=1, sequence_tokens=tokens, method="qlora", precision="autocast", optimizer=None
    )
    deploy = planner.Deployment(gpu=gpu, dtype="bf16", weight_dtype="nf4")
    made = prepare(LLAMA, deploy)
    program = training_phase(made.model, work, made.deploy, made.setting).program
    found = {"forward": set(), "backward": set()}
    for segment in program.segments:
        for op in segment.ops:
            if op.kernel == "dequantize_4bit":
                found[segment.phase].add(op.allocates[0].name.split(",")[0])
    assert found["forward"] == whole
    assert found["backward"]


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        ({"weight_dtype": None}, {}, "method='qlora' is of weights of 4 bits"),
        ({"weight_dtype": "int8"}, {}, "training of bitsandbytes weights is not planned yet"),
        ({}, {"method": "full"}, "training of bitsandbytes weights is not planned yet"),
        ({"dtype": "fp16"}, {}, "with dtype='fp16': 'bf16'"),
        ({"gpu": "mi300x"}, {}, "batch · sequence_tokens=8 on mi300x: above 1536, or a GPU of"),
        ({}, {"lora": planner.LoRA(dtype="fp16")}, "lora.dtype='fp16': None or 'bf16'"),
    ],
)
def test_what_is_not_planned_is_refused(change, given, message):
    deploy = planner.Deployment(**{"gpu": "cpu", "weight_dtype": "nf4", **change})
    work = planner.Training(**{"batch": 1, "sequence_tokens": 8, "method": "qlora", **given})
    with pytest.raises(ConfigError, match=message):
        planner.estimate(LLAMA, work, deploy)
