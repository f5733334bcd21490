"""Every mistake, once in an otherwise sound decoder: caught and named; the sound one passes."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attnlab import alibi, masks
from attnlab.kv_cache import KVCache
from attnlab.probes import check
from attnlab.transformer import Transformer
from planner import read_config
from planner.errors import ConfigError
from tests.attnlab.probes.tiny import D, Tiny, V

BROKEN = {
    "mask one off": (("mask one off",), {}, "causal-leak", "the mask is 1 off"),
    "mask one off in sdpa": (("mask one off", "sdpa"), {}, "causal-leak", "the mask is 1 off"),
    "no mask": (("no mask",), {}, "causal-leak", "no causal mask"),
    "no mask in training": (("trained unmasked",), {}, "causal-leak", "no causal mask"),
    "a norm over the sequence": (("sequence norm",), {}, "causal-leak", "a norm over the sequence"),
    "experts choose tokens": (("expert choice",), {}, "causal-leak", "routing over the sequence"),
    "a centred convolution": (("conv",), {}, "causal-leak", "a convolution"),
    "a norm over the batch": (("batch norm",), {}, "batch-dependence", ""),
    "blind to itself": (("blind to itself",), {}, "self-masked", ""),
    "a row without keys": (("empty row", "-inf"), {}, "masked-row-nan", "NaN"),
    "unscaled": (("unscaled",), {"heads": 2, "width": 64}, "attention-unscaled", ""),
    "unscaled in sdpa": (("unscaled", "sdpa"), {}, "attention-unscaled", ""),
    "scaled twice": (("scaled twice",), {"heads": 2, "width": 64}, "attention-scaled-twice", ""),
    "scaled by the width": (("scaled by width",), {}, "attention-scaled-twice", "model's width"),
    "one-hot attention": (("sharp",), {}, "softmax-saturation", ""),
    "rotary offset of the cache": (("rope", "offset"), {}, "cache-drift", ""),
    "a cache that does not grow": (("rope", "stale cache"), {}, "cache-drift", ""),
    "a window one too wide": (("wide window",), {"window": 8}, "window-mismatch", "reaches past"),
    "ALiBi with the other sign": (("alibi rises",), {"alibi": True}, "alibi-slopes", "wrong sign"),
    "ALiBi that is not there": ((), {"alibi": True}, "alibi-slopes", ""),
    "padding that attends": (("ignores padding",), {}, "padding-attends", ""),
    "-inf under padding": (("-inf",), {}, "masked-row-nan", ""),
    "positions that shift": (("learned",), {}, "left-padding-positions", ""),
    "positions that are clipped": (("clipped",), {}, "positions-past-table", "share"),
    "a growing residual": (("growing",), {"layers": 8}, "residual-growth", ""),
    "a dead head": (("dead head",), {}, "dead-heads", ""),
    "beyond fp16": (("loud",), {}, "fp16-overflow", ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_decoder_is_caught_and_named(name):
    faults, config, edge, title = BROKEN[name]
    found = {f.id: f for f in check(Tiny(*faults, **config))}
    assert edge in found
    assert title in found[edge].title
    assert found[edge].severity != "info"


SOUND = {
    "plain": ((), {}),
    "rotary": (("rope",), {}),
    "rotary, sdpa": (("rope", "sdpa"), {}),
    "ALiBi": (("alibi",), {"alibi": True}),
    "a window": (("rope",), {"window": 8}),
    "one wide head": (("rope",), {"heads": 1, "width": 64}),
    "tokens choose experts": (("token choice",), {}),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_decoder_passes(name):
    faults, config = SOUND[name]
    assert check(Tiny(*faults, **config)) == []


def test_a_deep_decoder_with_norms_before_passes():
    assert check(Tiny(layers=26), probes=("residual_growth",)) == []


def test_a_causal_convolution_does_not_leak():
    assert check(Tiny("causal conv"), probes=("causal_leak",)) == []


@pytest.mark.parametrize(("layers", "severity"), [(12, "medium"), (26, "high")])
def test_post_norm_is_as_bad_as_it_is_deep(layers, severity):
    (found,) = check(Tiny("post-norm", layers=layers), probes=("residual_growth",))
    assert (found.id, found.severity) == ("post-norm-deep", severity)


def test_a_leak_is_placed_at_its_module():
    (leak,) = check(Tiny("conv"), probes=("causal_leak",))
    assert leak.where == "layers.0.extra.conv (Conv1d)"
    assert leak.severity == "critical"


def test_drift_begins_where_the_cache_is_wrong():
    (drift,) = check(Tiny("rope", "offset"), probes=("cache_drift",))
    assert "from token 5 on" in drift.seen
    assert "layers.0.attention" in drift.where


def test_a_module_is_left_as_it_was():
    module = Tiny("rope", "batch norm").train()
    module.embed.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    check(module)
    assert all(m.training for m in module.modules())
    assert all(torch.equal(before[name], x) for name, x in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert not module.embed.weight.requires_grad


class Dropped(Tiny):
    """Dropout everywhere, also in train mode, which the probes take for nothing."""

    def forward(self, input_ids, **more):
        torch.nn.functional.dropout(self.embed.weight, 0.5, training=True)
        out = super().forward(input_ids, **more)
        out.logits = torch.dropout(out.logits, 0.9, train=self.training)
        return out


def test_dropout_is_no_leak():
    assert check(Dropped("rope").train()) == []


class OverEmbeddings(nn.Module):
    """Floats [B, S, D] → floats; a running mean over the whole sequence leaks."""

    def __init__(self, leaks):
        super().__init__()
        self.linear, self.leaks = nn.Linear(D, D), leaks

    def forward(self, x):
        mean = x.mean(1, keepdim=True) if self.leaks else x.cumsum(1)
        return self.linear(x) + mean


def test_embeddings_are_probed_when_asked():
    assert check(OverEmbeddings(False), takes="embeddings") == []
    found = check(OverEmbeddings(True), takes="embeddings")
    assert [f.id for f in found] == ["causal-leak"]
    assert check(OverEmbeddings(True), takes="embeddings", causal=False) == []


def test_an_encoder_may_look_ahead():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, 4, 64, batch_first=True), 2, enable_nested_tensor=False
    )
    assert check(encoder, takes="embeddings", width=D) == []
    found = check(encoder, takes="embeddings", width=D, causal=True)
    assert found[0].id == "causal-leak"
    assert "no causal mask in attention 0" in found[0].title


LLAMA = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


def ours(**config):
    torch.manual_seed(0)
    built = Transformer(read_config({**LLAMA, **config}), dtype=torch.float32, device="cpu")
    for p in built.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.1)
    return built


def test_attnlabs_own_transformer_passes():
    assert check(ours()) == []
    assert check(ours(model_type="mistral", sliding_window=8)) == []


def test_attnlab_with_a_mask_one_off_is_caught(monkeypatch):
    right = masks.make_mask

    def ahead(queries, keys, pattern, **more):
        return right(queries + 1, keys._replace(in_order=False), pattern, **more)

    monkeypatch.setattr("attnlab.transformer.make_mask", ahead)
    assert check(ours())[0].id == "causal-leak"


def test_attnlab_with_a_window_one_too_wide_is_caught():
    module = ours(model_type="mistral", sliding_window=9)
    config = {**LLAMA, "model_type": "mistral", "sliding_window": 8}
    object.__setattr__(module.model, "config_json", json.dumps(config))
    assert "window-mismatch" in [f.id for f in check(module)]


@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_attnlab_with_rising_alibi_is_caught(monkeypatch, attention):
    right = alibi.slope_tensor
    config = {
        "model_type": "bloom", "vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4,
    }  # fmt: skip
    module = Transformer(
        read_config(config), dtype=torch.float32, device="cpu", attention=attention
    )
    assert [f for f in check(module) if f.id == "alibi-slopes"] == []
    monkeypatch.setattr(alibi, "slope_tensor", lambda *a, **k: -right(*a, **k))
    assert "alibi-slopes" in [f.id for f in check(module)]


def test_attnlab_with_a_cache_one_off_is_caught(monkeypatch):
    right = KVCache.begin

    def late(self, T, **more):
        held = self.lengths[0]
        return right(self, T, **more) + (1 if held else 0)

    monkeypatch.setattr(KVCache, "begin", late)
    found = check(ours(), probes=("cache_drift",))
    assert [f.id for f in found] == ["cache-drift"]


class Averaged(Tiny):
    """BatchNorm1d: it averages over the sequence in train mode alone."""

    def __init__(self):
        super().__init__("rope")
        self.batch_norm = nn.BatchNorm1d(D)

    def forward(self, input_ids, past_key_values=None, use_cache=False, attention_mask=None):
        x = self.batch_norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, None, attention_mask)[0]
        return self.head(x)


def test_a_leak_of_train_mode_alone_is_caught_and_statistics_stay():
    module = Averaged().eval()
    (leak,) = check(module, probes=("causal_leak",))
    assert "train mode" in leak.seen
    assert "BatchNorm1d" in leak.where
    assert int(module.batch_norm.num_batches_tracked) == 0


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Linear(4, 4), "cannot be run"),
        (SimpleNamespace(), "an nn.Module"),
        (nn.Embedding(7, 4).to("meta"), "meta device"),
        (nn.Sequential(nn.Embedding(V, D), nn.Flatten(1)), "is needed"),
    ],
)
def test_what_cannot_be_probed_is_said_in_one_line(module, said):
    with pytest.raises(ConfigError, match=said) as refused:
        check(module)
    assert "\n" not in str(refused.value)


def test_a_short_table_is_probed_within():
    class Short(Tiny):
        def __init__(self):
            super().__init__("rope")
            self.table = nn.Embedding(16, D)

        def forward(self, input_ids, **more):
            self.table(torch.arange(input_ids.shape[1]))
            return super().forward(input_ids, **more)

    assert {f.severity for f in check(Short())} == {"info"}
