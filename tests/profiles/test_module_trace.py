"""Modules traced on fake tensors, against figures that others measured and against real runs."""

import json
import sys

import pytest
import torch
from torch import nn

import planner
from attnlab.training import next_token_loss, training_step
from attnlab.transformer import Transformer
from planner.allocator import AllocatorSettings, DeviceAllocator
from planner.allocator.simulate import Replay
from planner.cli import commands as cli
from profiles.meters import LiveTensorMeter
from profiles.module_trace import fake_ids, trace_module
from profiles.recording import AllocationRecorder
from profiles.targets import trace_target
from tests.planner.allocator.reference import rising
from tests.planner.configs import TINY, build

SIZES = {"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}
MEASURED = {
    "llama": {**SIZES, **HEADS, "intermediate_size": 688},
    "mixtral": {
        **SIZES,
        **HEADS,
        "intermediate_size": 512,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "gpt2": {
        "n_embd": 256,
        "n_layer": 4,
        "n_head": 8,
        "n_positions": 512,
        "vocab_size": 1024,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}


def main(arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


def written(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "dtype", "tokens", "inference", "training"),
    [
        ("llama", "fp32", 128, 3_720_192, 24_192_008),
        ("llama", "bf16", 128, 1_860_608, 14_869_512),
        ("llama", "bf16", 256, 3_721_216, 29_739_016),
        ("mixtral", "bf16", 128, 3_185_728, 29_821_480),
        ("mixtral", "fp32", 256, 12_703_808, 70_108_296),
        ("gpt2", "fp32", 128, 7_734_272, 33_869_832),
        ("gpt2", "bf16", 256, 7_735_296, 36_261_896),
    ],
)
def test_peaks_equal_those_that_others_measured(tmp_path, kind, dtype, tokens, inference, training):
    """Live storages of transformers 5.23.0 on a CPU, sdpa, batch 2, weights not counted: a forward
    with a cache, a step's forward and backward (`infer_peak_cache1`, `train_peak` of an independent
    measurement with random weights).
    """
    path = written(tmp_path, {"model_type": kind, **MEASURED[kind]})
    for train, expected in ((False, inference), (True, training)):
        traced = trace_target(path, batch=2, tokens=tokens, dtype=dtype, train=train)
        assert traced.peak_live_bytes - traced.split()["weights"] == expected


@pytest.mark.parametrize(("logits", "published_gib"), [("all", 1.51), ("last", 0.955)])
def test_an_8b_prefill_equals_an_independent_trace(logits, published_gib):
    """Llama-3.1-8B, batch 1, 4 096 tokens, sdpa in transformers: activations and KV cache."""
    traced = trace_target("llama-3.1-8b", batch=1, tokens=4096, logits=logits)
    held = traced.peak_live_bytes - traced.split()["weights"]
    assert held / 2**30 == pytest.approx(published_gib, abs=0.005)


def test_an_8b_prefill_reserves_what_an_independent_simulator_says():
    """Prefill 1 × 2 048, last logits, no workspace: 15 805.5 MiB allocated, 15 914 MiB reserved."""
    traced = trace_target("llama-3.1-8b", batch=1, tokens=2048, logits="last")
    stats = traced.allocator()
    assert stats.peak_allocated_bytes / 2**20 == pytest.approx(15_805.5, abs=0.5)
    assert stats.peak_reserved_bytes / 2**20 == pytest.approx(15_914, abs=0.5)


def test_two_adamw_steps_of_8b_reserve_what_an_independent_simulator_says():
    """1 × 4 096 tokens, bf16, foreach: 77 197 MiB allocated, 81 760 MiB reserved.

    That one puts segments at rising addresses; with those of a driver it is 83 764, and an H200
    reserved 83 800.
    """
    traced = trace_target("llama-3.1-8b", batch=1, tokens=4096, train=True, optimizer="adamw")
    stats = traced.allocator()
    assert stats.peak_allocated_bytes / 2**20 == pytest.approx(77_197, abs=0.5)
    assert stats.peak_reserved_bytes / 2**20 == pytest.approx(83_800, rel=1e-3)
    upward = DeviceAllocator(place=rising())
    Replay(upward).feed(traced.events)
    assert upward.peak_reserved_bytes / 2**20 == pytest.approx(81_760, abs=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3"])
def test_a_traced_step_of_attnlab_equals_the_real_one(name, dtype):
    model = planner.read_config(TINY[name])
    live = Transformer(model, dtype=dtype, device="cpu")
    ids = torch.zeros(2, 23, dtype=torch.long)
    weights = sum(t.nbytes for t in (*live.parameters(), *live.buffers()))
    with LiveTensorMeter() as meter:
        training_step(live, ids, ids)
    traced = trace_module(
        Transformer(model, dtype=dtype, device="cpu"),
        {"ids": fake_ids(2, 23)},
        train=True,
        loss=lambda out: next_token_loss(out, fake_ids(2, 23)),
    )
    assert traced.peak_live_bytes - weights == meter.peak_bytes


@pytest.mark.parametrize("implementation", ["foreach", "fused", "for-loop"])
def test_a_traced_step_with_adamw_equals_the_real_one(implementation):
    def module():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 32))

    real, x = module(), torch.randn(16, 64)
    chosen = {name: implementation == name for name in ("foreach", "fused")}
    optimizer = torch.optim.AdamW(real.parameters(), lr=1e-3, **chosen)
    weights = sum(p.nbytes for p in real.parameters())
    with LiveTensorMeter() as meter:
        for _ in range(2):
            loss = real(x).float().mean()
            loss.backward()
            del loss
            optimizer.step()
            real.zero_grad(set_to_none=True)
    steps = 4 * len(list(real.parameters()))  # its counters, which a GPU's user has on the host
    traced = trace_module(module(), x, train=True, optimizer="adamw", optimizer_impl=implementation)
    assert abs(traced.peak_live_bytes - weights + steps - meter.peak_bytes) <= steps
    fused = implementation == "fused"  # it counts on the device
    assert traced.split()["optimizer"] == 2 * weights + fused * steps
    assert set(traced.split()) <= {"weights", "optimizer", "gradients", "activations"}


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3", "gemma2"])
def test_a_traced_forward_equals_the_real_one(name, tmp_path):
    live = build(TINY[name], device="cpu", dtype=torch.bfloat16)
    ids = torch.zeros(2, 24, dtype=torch.long)
    with torch.no_grad(), LiveTensorMeter() as meter:
        out = live(ids, use_cache=True)
        del out
    path = written(tmp_path, {**TINY[name], "dtype": "bfloat16"})
    traced = trace_target(path, batch=2, tokens=24)
    assert traced.peak_live_bytes - traced.split()["weights"] == meter.peak_bytes


def test_the_events_are_a_trace_that_the_allocator_can_play():
    traced = trace_module(nn.Linear(512, 512), fake_ids(4, 512).float(), name="linear")
    stats = traced.allocator(workspace_bytes=2**20)
    assert stats.peak_requested_bytes >= traced.peak_live_bytes
    pages = traced.allocator(settings=AllocatorSettings(expandable_segments=True))
    assert pages.peak_allocated_bytes <= stats.peak_allocated_bytes
    table = traced.at_peak()
    assert table["bytes"].sum() == traced.peak_live_bytes
    assert list(table.columns) == ["kind", "op", "module", "phase", "count", "bytes"]


def test_what_is_tied_stays_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    traced = trace_module(Tied(), fake_ids(2, 5), train=True)
    assert traced.split()["weights"] == 50 * 8 * 4
    kinds = zip(traced.made, traced.kinds, strict=True)
    gradients = [made.size_bytes for made, kind in kinds if kind == "gradients"]
    assert gradients == [50 * 8 * 4] * 2  # one a step, for both uses


def test_the_module_that_reached_the_peak_is_named():
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4096)), nn.Linear(4096, 16))
    traced = trace_module(net, fake_ids(64, 8).float())
    assert (traced.peak_allocation.module, traced.peak_allocation.op) == ("2", "addmm")
    assert traced.at_peak().iloc[0]["module"] == "1.0"


def test_a_resized_storage_counts_at_its_new_size():
    with AllocationRecorder() as recorder:
        t = torch.empty(10)
        t.resize_(1000)
    assert recorder.live_bytes == 4000
    del t
    assert recorder.live_bytes == 0
    assert len(recorder.trace) == 4


FACTORIES = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 100))

def with_inputs():
    return nn.Linear(16, 4), (torch.zeros(3, 16),)

def with_loss():
    return nn.Linear(16, 4), {"input": torch.zeros(3, 16)}, lambda out: out.square().sum()

def number():
    return 3

def fails():
    raise RuntimeError("no luck\\nat all")

class Values(nn.Module):
    def forward(self, ids):
        return ids.float() if ids.sum().item() else ids

def values():
    return Values()

constant = 5
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_models", None)


def test_a_factory_of_the_current_directory_is_traced(own_code, capsys):
    assert main(["trace", "my_models:net", "--batch", "2", "--tokens", "7", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["split_bytes"]["weights"] == (100 * 16 + 16 * 100 + 100) * 4
    assert answer["peak"]["op"] == "addmm"
    for target in ("with_inputs", "with_loss"):
        assert main(["trace", f"my_models:{target}", "--train", "--optimizer", "sgd"]) == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_models:nothing", "my_models has no function 'nothing'"),
        ("my_models:constant", "my_models has no function 'constant'"),
        ("no_such_module:make", "no_such_module cannot be imported"),
        ("my_models:number", "my_models:number returned int: an nn.Module, (module, inputs)"),
        ("my_models:fails", "my_models:fails failed: no luck"),
        ("my_models:values", "tracing my_models:values"),
        ("no-such-model", "model='no-such-model' is neither a file nor in the catalogue"),
    ],
)
def test_a_bad_target_ends_in_one_line(own_code, capsys, target, message):
    assert main(["trace", target]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_options_end_in_one_line(own_code, capsys):
    for options, message in (
        (["--gpu", "abacus"], "gpu='abacus'"),
        (["--tokens", "0"], "tokens=0 is not allowed"),
        (["--optimizer", "adamw"], "optimizer='adamw' is not allowed without training"),
        (["--train", "--optimizer", "lion"], "optimizer='lion' is not allowed"),
    ):
        assert main(["trace", "my_models:net", *options]) == 2
        assert message in capsys.readouterr().err


def test_what_does_not_fit_exits_with_1_and_writes_its_table(tmp_path, capsys):
    table = tmp_path / "peak.csv"
    arguments = ["llama-3.1-8b", "--tokens", "128", "--gpu", "t4", "--csv", str(table)]
    assert main(["trace", *arguments]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert table.read_text().startswith("kind,op,module,phase,count,bytes")
