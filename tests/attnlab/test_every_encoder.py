"""Whatever reader made it: attnlab refuses an encoder, or computes what its class computes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planner
from attnlab.encoder import EncoderModel
from attnlab.weights import load_state_dict
from planner.runtimes.attnlab import missing_parts
from tests.attnlab.encoder_pairs import padding_mask
from tests.planner.huggingface import test_readers_encoders as words
from tests.planner.huggingface import test_readers_vision as images
from tests.planner.oracle import live_model
from tests.properties import examples

TOKENS, REAL = 8, [8, 3]
HEADED = {
    name: words.tiny(kind, architectures=[name], num_labels=2) for kind, name in words.CLASSES
}
VARIANTS = {
    **{
        f"{i} {kind}": words.tiny(kind, **change) for i, (kind, change) in enumerate(words.VARIANTS)
    },
    **{
        f"{i} {kind}": images.config_of(kind, **change)
        for i, (kind, change) in enumerate(images.VARIANTS)
    },
}


def runs(config):
    """Whether attnlab runs it."""
    return not missing_parts(planner.read_config(config))


CASES = {name: config for name, config in {**HEADED, **VARIANTS}.items() if runs(config)}


def assert_equal(config):
    """What our module makes of random inputs, ragged where they are words, is what theirs does."""
    live = live_model(config, auto="model", device="cpu").float()
    torch.manual_seed(5)
    for name, p in live.named_parameters():
        norm = "norm" in name.lower() and name.endswith("weight")
        torch.nn.init.normal_(p, mean=float(norm), std=0.2)
    model = planner.read_config(config)
    ours = EncoderModel(model, dtype=torch.float32, device="cpu").requires_grad_(False)
    load_state_dict(ours, live.state_dict())
    if model.ends.patches is None:
        T = min(TOKENS, model.max_position_embeddings)
        real = [min(n, T) for n in REAL]
        inputs = torch.randint(2, model.vocab_size, (2, T))
        given_, mine = {"attention_mask": padding_mask(real, T)}, {"tokens": real}
    else:
        conv = ours.get_submodule(model.ends.patches.projection)
        inputs = torch.randn(2, conv.in_channels, *model.ends.patches.image_size)
        given_, mine, real = {}, {}, None
    with torch.no_grad():
        out = live(inputs, **given_)
    expected = out.get("logits", out.get("last_hidden_state"))
    if "start_logits" in out:
        expected = torch.stack([out.start_logits, out.end_logits], dim=-1)
    made = ours(inputs, **mine)
    assert made.shape == expected.shape
    if real is not None and made.dim() == 3:
        shown = padding_mask(real, made.shape[1]).bool()
        made, expected = made[shown], expected[shown]
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    if ours.ends.pooler is not None and "pooler_output" in out:
        pooled = ours.pooled(ours.states(inputs, **mine))
        torch.testing.assert_close(pooled, out.pooler_output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_those_of_the_class(name):
    assert_equal(CASES[name])


@given(data=st.data())
@examples(25)
def test_random_encoders_equal_those_of_their_class(data):
    draw, size = data.draw, st.integers(1, 40)
    config = dict(draw(st.sampled_from([HEADED[name] for name in HEADED if name in CASES])))
    heads = draw(st.integers(1, 4))
    config |= dict(
        num_attention_heads=heads,
        hidden_size=2 * heads * draw(st.integers(1, 5)),
        num_hidden_layers=draw(st.integers(1, 4)),
        intermediate_size=draw(size),
        hidden_dim=draw(size),
        vocab_size=draw(st.integers(4, 90)),
        max_position_embeddings=draw(st.integers(3, 40)),
        type_vocab_size=draw(st.integers(1, 4)),
        local_attention=draw(size),
        global_attn_every_n_layers=draw(st.integers(1, 5)),
        hidden_act=draw(st.sampled_from(("gelu", "relu", "gelu_new"))),
        hidden_activation=draw(st.sampled_from(("gelu", "silu"))),
        classifier_activation=draw(st.sampled_from(("gelu", "relu"))),
        classifier_pooling=draw(st.sampled_from(("cls", "mean"))),
    )
    flags = ("attention_bias", "mlp_bias", "norm_bias", "decoder_bias", "classifier_bias")
    config |= {name: draw(st.booleans()) for name in flags}
    if runs(config):
        assert_equal(config)


def test_most_classes_of_encoders_run():
    ran = {name for name in HEADED if name in CASES}
    assert {"BertForQuestionAnswering", "CamembertForMaskedLM", "ModernBertForMaskedLM"} <= ran
    assert len(ran) > 30, sorted(ran)
