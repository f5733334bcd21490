"""Steps inside torch.autocast: peaks to the byte, over random small decoders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import planner
from planner.program import Dims
from planner.runtimes.transformers_code import regime
from planner.runtimes.transformers_code.forward import pass_program
from planner.runtimes.transformers_code.regime import Pass
from profiles.meters import LiveTensorMeter, module_bytes
from tests.attnlab.families import FAMILIES
from tests.planner.runtimes.test_transformers_lora import adapted_decoders, with_adapters
from tests.planner.runtimes.test_transformers_training import predicted, written
from tests.planner.small_decoders import (
    CHECKPOINTING,
    EAGER_ONLY,
    KINDS,
    NO_TOKENS,
    built,
    checkpoint,
    decoders,
    described,
    padding,
    takes_padding,
    words,
)
from tests.properties import examples

PARTLY_TURNED = {
    "model_type": "nemotron",
    "vocab_size": 3,
    "tie_word_embeddings": False,
    **NO_TOKENS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
"""Its peak is where turned columns in float32 join others in bf16."""


def step_meter(live, batch, tokens, optimizer=None, *, padded=False):
    ids = words(live.config, batch, tokens)
    mask = padding(batch, tokens) if padded else None
    with LiveTensorMeter() as meter:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = live(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return meter


@examples(50, fuzz=100)
@given(
    config=decoders(),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 30),
    eager=st.booleans(),
    how=CHECKPOINTING,
    padded=st.booleans(),
)
@example(config=PARTLY_TURNED, batch=1, tokens=11, eager=False, how=("full", 1), padded=False)
def test_the_peak_of_a_step_is_exact(config, batch, tokens, eager, how, padded):
    padded = padded and takes_padding(config)
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), "fp32", attention).train()
    checkpoint(live, how)
    meter = step_meter(live, batch, tokens, padded=padded)
    model = planner.read_config(live.config.to_dict())
    what = {"attention": attention, "dtype": "bf16", "autocast": "bf16", "padded": padded}
    assert predicted(model, batch, tokens, **what, **written(how)).live_bytes == meter.peak_bytes


@examples(30, fuzz=60)
@given(
    adapted=adapted_decoders(),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 20),
    eager=st.booleans(),
    how=CHECKPOINTING,
)
def test_the_peak_of_a_step_with_adapters_is_exact(adapted, batch, tokens, eager, how):
    """Frozen weights in bf16, adapters in fp32: what Trainer(bf16=True) makes of peft's models."""
    config, lora = adapted
    assume(how[0] != "selective" or config.get("clip_qkv") is None)  # refused
    lora = replace(lora, dtype=None)
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), "bf16", attention)
    checkpoint(live, how)
    live = with_adapters(live, lora)
    meter = step_meter(live, batch, tokens)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer=None,
        method="lora",
        lora=lora,
        precision="autocast",
        checkpointing=how[0],
        checkpoint_every=how[1],
    )
    model = planner.read_config(live.config.to_dict())
    deploy = planner.Deployment(gpu="cpu", dtype="bf16", attention=attention)
    memory = planner.estimate(model, work, deploy).memory
    assert memory.weights_bytes == module_bytes(live)
    assert memory.peak_live_bytes - memory.weights_bytes == meter.peak_bytes


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama", "mistral", "qwen2", "gpt_neox"])
def test_a_step_with_adamw_adds_up(name):
    config = described(FAMILIES[name]().to_dict())
    attention = "eager" if name in EAGER_ONLY else "sdpa"
    live = built(config, "fp32", attention).train()
    adamw = torch.optim.AdamW(live.parameters(), foreach=True)
    step_meter(live, 2, 30, adamw)  # makes the states
    meter = step_meter(live, 2, 30, adamw)
    states = sum(value.nbytes for state in adamw.state.values() for value in state.values())
    work = planner.Training(batch=2, sequence_tokens=30, precision="autocast")
    deploy = planner.Deployment(gpu="cpu", attention=attention)
    memory = planner.estimate(planner.read_config(config.to_dict()), work, deploy).memory
    assert memory.optimizer_bytes == states
    assert memory.weights_bytes == module_bytes(live)
    assert memory.peak_live_bytes == module_bytes(live) + states + meter.peak_bytes


# -- a GPU's list: its ops take and make float32 ---------------------------------------------------

WIDE = {
    "pow": lambda x: torch.pow(x, 3.0),
    "square": torch.square,
    "softmax": lambda x: functional.softmax(x, -1),
    "rsqrt": torch.rsqrt,
    "sum": lambda x: x.sum(-1),
    "layer_norm": lambda x: functional.layer_norm(x, (4,)),
}
AS_THEY_ARE = {
    "mean": lambda x: x.mean(-1),
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "add": lambda x: x + x,
}


def test_torch_widens_on_a_gpu_what_is_widened_here():
    with FakeTensorMode():
        x = torch.empty(4, 4, device="cuda", dtype=torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            widened = {name for name, op in (WIDE | AS_THEY_ARE).items() if op(x).itemsize == 4}
            product = functional.linear(x.float(), x.float())
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    assert widened == WIDE.keys()
    assert product.dtype == torch.bfloat16


class Kernels(TorchDispatchMode):
    """Which ops of ATen run, and the dtype of what each makes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            dtype = getattr(made, "dtype", None)
            self.seen.append((func.overloadpacket.__name__, dtype))
        return made


def on_a_gpu(op, dtype, *, casts):
    """The kernels of an op of [4, 4] in autocast, or outside."""
    with FakeTensorMode(), Kernels() as kernels:
        x = torch.empty(4, 4, device="cuda", dtype=dtype)
        labels = torch.zeros(4, dtype=torch.long, device="cuda")
        kernels.seen.clear()
        torch.set_autocast_enabled("cuda", casts)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            op(x, labels)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    return kernels.seen


WIDE_SOFTMAX = {
    "named": (lambda x, labels: functional.softmax(x, -1, dtype=torch.float32), False),
    "listed": (lambda x, labels: functional.softmax(x, -1), True),
}


@pytest.mark.parametrize("how", WIDE_SOFTMAX)
def test_a_gpu_takes_fp16_to_a_float32_softmax_without_a_copy(how):
    op, casts = WIDE_SOFTMAX[how]
    softmax = ("_softmax", torch.float32)
    assert on_a_gpu(op, torch.float16, casts=casts) == [softmax]
    copy = ("_to_copy", torch.float32)
    assert on_a_gpu(op, torch.bfloat16, casts=casts) == [copy, softmax]
    model = planner.load_model("llama-3.2-1b")
    if casts:  # where no mask in float32 has widened the scores before
        config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
        model = planner.read_config(config)
    for low, copied in (("bf16", True), ("fp16", False)):
        what = {"dtype": low, "autocast": low if casts else None, "attention": "eager"}
        step = Pass(kind="training", device="cuda", **what)
        dims = Dims(batch=2, tokens=9, context=9)
        program = pass_program(model, step, regime.Regime.of(model, dims))
        made = [(op.kernel, b) for s in program.segments for op in s.ops for b in op.allocates]
        attention = [b for kernel, b in made if kernel == "_softmax"]
        assert attention
        assert {b.itemsize for b in attention} == {4}
        copies = [b for kernel, b in made if kernel == "_to_copy" and "scores" in b.name]
        assert any(b.itemsize == 4 for b in copies) == copied


def test_a_gpu_widens_what_follows_the_logarithms_of_cross_entropy():
    kernels = on_a_gpu(functional.cross_entropy, torch.bfloat16, casts=True)
    assert kernels[:2] == [("_log_softmax", torch.bfloat16), ("_to_copy", torch.float32)]
    assert [name for name, _ in kernels[2:]] == ["nll_loss_forward"]


def _of_nll(given):
    return {name: value for name, value in given.items() if name != "label_smoothing"}


class GpuList(TorchFunctionMode):
    """The ops of a GPU's float32 list, cast on the CPU."""

    FUNCTIONS = (
        torch.pow,
        torch.Tensor.pow,
        torch.square,
        torch.rsqrt,
        torch.Tensor.sum,
        functional.layer_norm,
    )
    inside = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is functional.cross_entropy and self.inside:  # a CPU's list has it as a whole
            logs = functional.log_softmax(args[0], -1)
            return functional.nll_loss(logs, *args[1:], **_of_nll(kwargs))
        softmax = func is functional.softmax and kwargs.get("dtype") is None
        listed = softmax or func in self.FUNCTIONS
        if listed and self.inside and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


@examples(40, fuzz=80)
@given(
    config=decoders(tuple(kind for kind in KINDS if kind != "nemotron")),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 20),
    eager=st.booleans(),
)
def test_the_long_list_is_exact_too(config, batch, tokens, eager):
    """But where a token has one expert: two bytes a token too much are planned there."""
    assume(config.get("num_experts_per_tok") != 1)
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), "fp32", attention).train()
    ids = words(live.config, batch, tokens)
    with LiveTensorMeter() as meter:
        with torch.autocast("cpu", dtype=torch.bfloat16), GpuList():
            loss = live(ids, labels=ids, use_cache=False).loss
        loss.backward()
    model = planner.read_config(live.config.to_dict())
    what = {"attention": attention, "dtype": "bf16", "autocast": "bf16"}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(regime, "widens", lambda device: True)
        pass_program.cache_clear()
        found = predicted(model, batch, tokens, **what).live_bytes
    pass_program.cache_clear()
    assert found == meter.peak_bytes


@pytest.mark.parametrize(
    ("model", "dtype", "said"),
    [
        ("llama-3.1-8b", "fp32", "in dtype='fp32' is not planned: bf16 or fp16"),
        (
            {"model_type": "nemotron", "num_key_value_heads": 8},
            None,
            "of model_type=nemotron on a GPU is not planned yet",
        ),
    ],
)
def test_regions_that_are_not_planned_are_refused(model, dtype, said):
    work = planner.Training(batch=1, sequence_tokens=8, precision="autocast")
    deploy = planner.Deployment(gpu="h200", dtype=dtype)
    with pytest.raises(planner.ConfigError, match=said):
        planner.estimate(planner.load_model(model), work, deploy)
