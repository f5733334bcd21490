"""lit-gpt's finetuning steps: every allocation as its ops make them.

Peaks that it published are in tests/profiles/test_published.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import planner
from planner import ConfigError
from planner.layers import GQA, Dense, Layer, Norm, RoPE
from planner.runtimes.litgpt_finetuning import as_kept, training_phase
from planner.runtimes.litgpt_training.model import as_litgpt
from planner.runtimes.litgpt_training.regime import Regime, Step
from planner.runtimes.litgpt_training.step import step_program
from profiles.meters import module_bytes
from tests.planner.lit_gpt_steps import TRAINED, Lit, built, chunked_cross_entropy, watched_step
from tests.planner.steps import curve, events, square

NEOX = Lit(
    n_layer=4,
    n_head=4,
    n_query_groups=4,
    head_size=8,
    intermediate_size=128,
    padded_vocab_size=24,
    rope_n_elem=2,
)
PHI = replace(NEOX, shared_attention_norm=True, lm_head_bias=True, rope_n_elem=4)
LLAMA = replace(
    NEOX,
    parallel_residual=False,
    bias=False,
    norm="RMSNorm",
    mlp="LLaMAMLP",
    intermediate_size=56,
    rope_n_elem=8,
)
FALCON = replace(PHI, bias=False, lm_head_bias=False, rope_n_elem=8, n_query_groups=1)
QV, ALL = ("query", "value"), ("query", "key", "value", "projection", "mlp")
STEPS = [
    (replace(NEOX, adapted=QV), 1, 37),
    (replace(PHI, adapted=QV), 2, 140),
    (replace(LLAMA, adapted=QV), 2, 37),
    (replace(LLAMA, adapted=ALL, n_query_groups=2), 1, 140),
    (replace(LLAMA, adapted=("value",), n_query_groups=2), 3, 257),
    (replace(FALCON, adapted=QV), 2, 128),
    (replace(NEOX, adapted=("projection", "mlp"), padded_vocab_size=96), 1, 129),
    (replace(NEOX, method="adapter"), 1, 140),
    (replace(LLAMA, method="adapter", n_query_groups=2), 2, 37),
    (replace(FALCON, method="adapter-v2"), 1, 37),
    (replace(PHI, method="adapter-v2"), 1, 140),
    (replace(LLAMA, method="adapter-v2", n_layer=5), 2, 140),
    (replace(PHI, method="full"), 1, 140),
    (replace(LLAMA, method="full", n_query_groups=2), 2, 37),
    (replace(NEOX, method="full"), 3, 37),
]
TARGETS = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "projection": ("o_proj",),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def described(lit):
    """The same model, by Hugging Face's names."""
    gated, rms = lit.mlp == "LLaMAMLP", lit.norm == "RMSNorm"
    norm = Norm(kind="rmsnorm" if rms else "layernorm", eps=1e-5, bias=not rms)
    layer = Layer(
        attention=GQA(
            num_attention_heads=lit.n_head,
            num_key_value_heads=lit.n_query_groups,
            head_dim=lit.head_size,
            scaling=1.0,
            qkv_bias=lit.bias,
            o_bias=lit.bias,
        ),
        feed_forward=Dense(
            intermediate_size=lit.intermediate_size,
            activation="silu" if gated else "gelu",
            gated=gated,
            bias=lit.bias,
        ),
        norm=norm,
        placement="parallel"
        if lit.shared_attention_norm
        else ("parallel-two" if lit.parallel_residual else "pre"),
    )
    return replace(
        planner.load_model("llama-2-7b"),
        hidden_size=lit.n_embd,
        layers=(layer,) * lit.n_layer,
        vocab_size=lit.padded_vocab_size,
        final_norm=norm,
        positions=RoPE(rope_theta=1e4, rotary_dim=lit.rope_n_elem),
        lm_head_bias=lit.lm_head_bias,
        dtype="bf16",
    )


def planned(lit, batch, tokens):
    """The workload of a step, and its estimate on a CPU."""
    lora = None
    if lit.method == "lora":
        names = tuple(t for part in lit.adapted for t in TARGETS[part])
        gated = lit.mlp == "LLaMAMLP"
        lora = planner.LoRA(
            rank=lit.r, targets=tuple(t for t in names if gated or t != "gate_proj")
        )
    work = planner.Training(
        batch=batch, sequence_tokens=tokens, optimizer=None, method=lit.method, lora=lora
    )
    deploy = planner.Deployment(gpu="cpu", runtime="litgpt", dtype="bf16")
    return work, planner.estimate(described(lit), work, deploy)


def after_allocations(changes):
    """Live bytes after each."""
    return [live for _, live in curve(changes)]


@pytest.mark.parametrize(("lit", "batch", "tokens"), STEPS)
def test_every_allocation_of_a_step_is_that_of_its_ops(lit, batch, tokens):
    live = built(lit, tokens, torch.bfloat16)
    meter = watched_step(live, lit.padded_vocab_size, batch, tokens, chunked_cross_entropy)
    work, e = planned(lit, batch, tokens)
    phase = training_phase(e.model, as_kept(work, "bf16"), e.setting)
    assert after_allocations(events(phase.program, phase.dims)) == after_allocations(meter.events)
    assert e.memory.peak_live_bytes - e.memory.weights_bytes == meter.peak_bytes


@pytest.mark.parametrize(("lit", "batch", "tokens"), STEPS[:8])
def test_weights_and_adapters_are_the_modules(lit, batch, tokens):
    """Beside them what validation leaves behind: the prefix's keys and values."""
    live = built(lit, tokens, torch.bfloat16)
    kept = 2 * 10 * lit.n_embd * 2 * (lit.n_layer - 2) if lit.method == "adapter" else 0
    _, e = planned(lit, batch, tokens)
    assert e.memory.weights_bytes == module_bytes(live) + kept


@pytest.mark.parametrize(("lit", "batch", "tokens"), STEPS)
def test_the_ops_are_those_of_lit_gpt(lit, batch, tokens):
    """Where lit_gpt is installed: its own classes and its own loss."""
    pytest.importorskip("lit_gpt")
    import lit_gpt.adapter
    import lit_gpt.adapter_v2
    import lit_gpt.lora
    from lit_gpt.utils import chunked_cross_entropy as theirs

    modules = {"full": lit_gpt, "lora": lit_gpt.lora, "adapter": lit_gpt.adapter}
    own = {**modules, "adapter-v2": lit_gpt.adapter_v2}[lit.method]
    torch.set_default_dtype(torch.bfloat16)
    model = own.GPT(own.Config(**lit.names, block_size=tokens + 1))
    torch.set_default_dtype(torch.float32)
    model.max_seq_length = tokens
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(part in name for part in TRAINED[lit.method])
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))

    def forward(ids):
        return model(ids) if lit.method == "full" else model(ids, lm_head_chunk_size=128)

    real = watched_step(forward, lit.padded_vocab_size, batch, tokens, theirs)
    live = built(lit, tokens, torch.bfloat16)
    meter = watched_step(live, lit.padded_vocab_size, batch, tokens, chunked_cross_entropy)
    assert after_allocations(meter.events) == after_allocations(real.events)


# -- 4-bit weights -----------------------------------------------------------------------------


class MatMul4Bit(torch.autograd.Function):
    """bitsandbytes 0.41.1's, without its kernels: the input is an attribute of the node."""

    @staticmethod
    def forward(ctx, a, shape, bias):
        output = functional.linear(a, dequantised(shape).to(a.dtype), bias)
        ctx.shape, ctx.tensors = shape, a if any(ctx.needs_input_grad[:1]) else None
        return output

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantised(ctx.shape).to(grad.dtype), None, None


def dequantised(shape):
    """functional.dequantize_4bit of nested scales: float16, as Fabric quantised it."""
    absmax = torch.empty(-(-shape[0] * shape[1] // 64), dtype=torch.float32)
    out = torch.empty(shape, dtype=torch.float16)
    del absmax
    return out


class FourBitLinear(torch.nn.Linear):
    def forward(self, x):
        return MatMul4Bit.apply(x, tuple(self.weight.shape), self.bias)


@pytest.mark.parametrize(("lit", "batch", "tokens"), [STEPS[0], STEPS[2], STEPS[3]])
def test_inputs_of_4_bit_layers_live_until_the_graph_goes(lit, batch, tokens):
    live = built(lit, tokens, torch.bfloat16)
    for module in live.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = FourBitLinear
    meter = watched_step(live, lit.padded_vocab_size, batch, tokens, chunked_cross_entropy)
    work, _ = planned(lit, batch, tokens)
    lora = as_kept(work, "bf16").lora
    step = Step(method="lora", dtype="bf16", device="cpu", lora=lora, four_bit=True)
    dims = square(batch, tokens)
    program = step_program(as_litgpt(described(lit), tokens), step, Regime.of(dims))
    ours = after_allocations(events(program, dims))
    theirs = after_allocations(meter.events)
    assert ours == theirs


# -- what is trained ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "method", "trained"),
    [
        ("pythia-6.9b", "adapter", 30 * (10 * 4096 + 32)),
        ("llama-2-7b", "lora", 4_194_304),
        ("llama-2-13b", "lora", 6_553_600),
        ("llama-2-7b", "adapter", 1_229_760),
        ("llama-2-7b", "adapter-v2", 4_279_744),
    ],
)
def test_trained_parameters_are_those_that_it_prints(model, method, trained):
    """resource-tables.md: "Trainable parameters"; those of the prefix get no gradient."""
    lora = planner.LoRA(targets=("q_proj", "v_proj")) if method == "lora" else None
    work = planner.Training(batch=1, sequence_tokens=64, method=method, lora=lora)
    deploy = planner.Deployment(gpu="a100-40gb", runtime="litgpt", dtype="bf16")
    loaded = planner.load_model(model)
    e = planner.estimate(loaded, work, deploy)
    prefix = 0 if method == "lora" else (len(loaded.layers) - 2) * 10 * loaded.hidden_size
    assert e.memory.gradients_bytes == 2 * (trained - prefix)
    assert e.memory.optimizer_bytes == 2 * e.memory.gradients_bytes


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "how", "why"),
    [
        ("gemma-2b", {}, "model_type=gemma is not planned for runtime=litgpt"),
        ("mixtral-8x7b", {}, "model_type=mixtral is not planned for runtime=litgpt"),
        ("llama-2-7b", {"method": "qlora"}, "method='lora' with weight_dtype='nf4'"),
        ("llama-2-7b", {"sequence_tokens": 1}, "leaves no token to predict"),
        ("llama-2-7b", {"sequence_tokens": 5000}, "max_position_embeddings=4096"),
        ("llama-2-7b", {"checkpointing": "full"}, "checkpointing='full' is not planned"),
        ("llama-2-7b", {"lora": planner.LoRA(dtype="fp32")}, "lora.dtype='fp32' is not what"),
        ("llama-2-7b", {"lora": planner.LoRA(dora=True)}, "lora.dora=True is not what"),
    ],
)
def test_what_it_has_no_class_for_is_refused_in_a_line(model, how, why):
    asked = {"batch": 1, "sequence_tokens": 64, "method": "lora", **how}
    deploy = planner.Deployment(gpu="a100-40gb", runtime="litgpt", dtype="bf16")
    with pytest.raises(ConfigError, match=why) as refused:
        planner.estimate(planner.load_model(model), planner.Training(**asked), deploy)
    assert "\n" not in str(refused.value)


def test_inference_is_refused_in_a_line():
    work = planner.Inference(batch=1, prompt_tokens=64)
    deploy = planner.Deployment(gpu="a100-40gb", runtime="litgpt")
    with pytest.raises(ConfigError, match="runtime=litgpt plans training alone"):
        planner.estimate(planner.load_model("llama-2-7b"), work, deploy)
    with pytest.raises(ConfigError, match="runtime=litgpt plans training alone"):
        planner.kv_cache_bytes(
            planner.load_model("llama-2-7b"), batch=1, context_tokens=64, runtime="litgpt"
        )


def test_other_runtimes_have_no_llama_adapter():
    work = planner.Training(batch=1, sequence_tokens=64, method="adapter")
    for runtime in ("transformers", "attnlab"):
        with pytest.raises(ConfigError, match="method='adapter' is not planned"):
            planner.estimate(
                planner.load_model("llama-2-7b"),
                work,
                planner.Deployment(gpu="h200", runtime=runtime),
            )


def test_bitsandbytes_quantises_on_a_gpu_alone():
    work = planner.Training(batch=1, sequence_tokens=64, method="lora")
    deploy = planner.Deployment(gpu="cpu", runtime="litgpt", dtype="bf16", weight_dtype="nf4")
    with pytest.raises(ConfigError, match="quantises on a GPU alone"):
        planner.estimate(planner.load_model("llama-2-7b"), work, deploy)
