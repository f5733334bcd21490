"""Encoders of words and of images against transformers: outputs, padding, gradients, files."""

import json

import pytest
import torch
import transformers as hf

import planner
from attnlab.backend import backend_name
from attnlab.caches import build_cache
from attnlab.encoder import EncoderModel
from attnlab.training import IGNORED
from attnlab.transformer import Transformer
from attnlab.weights import load_safetensors, load_state_dict
from planner import ConfigError, Deployment, Inference
from tests.attnlab.encoder_pairs import (
    FAMILIES,
    IMAGE,
    LENGTH,
    ROBERTA,
    SIDE,
    WORDS,
    V,
    described,
    inputs_of,
    padding_mask,
    pair_of,
    theirs_of,
)
from tests.attnlab.rounding import assert_as_near, in_bfloat16

CLOSE = dict(rtol=1e-4, atol=2e-5)
TEXT = [family for family in FAMILIES if "vit" not in family]
REAL = [LENGTH, 5, 1]
MAIN = ["bert", "bert, words", "modernbert", "modernbert, words", "vit", "vit, images"]


@pytest.fixture(params=FAMILIES)
def pair(request):
    return pair_of(request.param)


def twin(ours, **settings):
    settings = dict(dtype=torch.float32, device="cpu") | settings
    other = EncoderModel(ours.model, **settings)
    other.load_state_dict(ours.state_dict())
    return other.requires_grad_(False)


def test_outputs_equal_those_of_transformers(pair):
    theirs, ours = pair
    inputs = inputs_of(ours.model)
    expected, pooled = theirs_of(theirs, inputs)
    torch.testing.assert_close(ours(inputs), expected, **CLOSE)
    if pooled is not None:
        torch.testing.assert_close(ours.pooled(ours.states(inputs)), pooled, **CLOSE)


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_padding_is_hidden_as_in_transformers(family, attention):
    theirs, ours = pair_of(family)
    ours = twin(ours, attention=attention)
    inputs = inputs_of(ours.model)
    expected, _ = theirs_of(theirs, inputs, REAL)
    made = ours(inputs, tokens=REAL)
    alone = [ours(inputs[b : b + 1, :n])[0] for b, n in enumerate(REAL)]
    for b, n in enumerate(REAL):
        real = slice(n) if made.dim() == 3 else slice(None)
        torch.testing.assert_close(made[b, real], expected[b, real], **CLOSE)
        torch.testing.assert_close(made[b, real], alone[b], **CLOSE)


@pytest.mark.parametrize("family", ["bert", "bert, words", "bert, sequences"])
def test_token_types_are_added(family):
    theirs, ours = pair_of(family)
    inputs = inputs_of(ours.model)
    types = torch.randint(2, inputs.shape, generator=torch.Generator().manual_seed(2))
    expected, _ = theirs_of(theirs, inputs, token_type_ids=types)
    torch.testing.assert_close(ours(inputs, token_types=types), expected, **CLOSE)
    assert not torch.allclose(ours(inputs), expected, **CLOSE)


@pytest.mark.parametrize("family", ["roberta", "roberta, words", "xlm-roberta, words"])
def test_a_padding_token_among_the_others_takes_no_position(family):
    theirs, ours = pair_of(family)
    inputs = inputs_of(ours.model)
    inputs[:, [0, 4, 5]] = ROBERTA["pad_token_id"]
    torch.testing.assert_close(ours(inputs), theirs_of(theirs, inputs)[0], **CLOSE)


def test_naive_and_sdpa_agree(pair):
    ours = pair[1]
    inputs = inputs_of(ours.model)
    assert ours.attention == "sdpa"
    torch.testing.assert_close(twin(ours, attention="naive")(inputs), ours(inputs), **CLOSE)


@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(pair, attention):
    theirs, ours = pair
    inputs = inputs_of(ours.model)
    exact = ours(inputs)
    rounded = twin(ours, attention=attention, dtype=torch.bfloat16)(inputs)
    assert_as_near(rounded, theirs_of(in_bfloat16(theirs), inputs)[0], exact)


def test_parameters_are_those_the_planner_counts_and_nothing_is_cached(pair):
    theirs, ours = pair
    built = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    assert built == {p.name: p.shape for p in ours.model.parameters()}
    table = {p.name: p.shape for p in ours.model.checkpoint_parameters()}
    assert table == {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    for kind in ("static", "dynamic"):
        assert not planner.kv_cache_bytes(
            ours.model, batch=2, context_tokens=9, dtype="bf16", runtime="attnlab",
            cache=planner.CacheSpec(kind=kind),
        )  # fmt: skip


@pytest.mark.parametrize("family", ["bert, words", "modernbert, words"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_loss_and_gradients_equal_those_of_transformers(family, checkpointing):
    theirs, ours = pair_of(family)
    ours = twin(ours, attention="naive").requires_grad_(True)
    inputs = inputs_of(ours.model)
    labels = torch.where(padding_mask(REAL, LENGTH).bool() & (inputs % 2 == 0), inputs, IGNORED)
    theirs.zero_grad()
    expected = theirs(inputs, attention_mask=padding_mask(REAL, LENGTH), labels=labels).loss
    expected.backward()
    logits = ours(inputs, tokens=REAL, checkpointing=checkpointing)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    made = {name: p.grad for name, p in ours.named_parameters()}
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    names = zip(ours.model.parameters(), ours.model.checkpoint_parameters(), strict=True)
    for here, there in names:
        if "word_embeddings" in there.name or "tok_embeddings" in there.name:
            made[here.name][WORDS["pad_token_id"]] = 0  # torch's padding_idx: see its own row
            wanted[there.name][WORDS["pad_token_id"]] = 0
        torch.testing.assert_close(made[here.name], wanted[there.name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MAIN)
def test_checkpoints_load_from_files(tmp_path, family):
    theirs, ours = pair_of(family)
    theirs.save_pretrained(tmp_path)
    model = planner.read_config(json.loads((tmp_path / "config.json").read_text()))
    other = EncoderModel(model, dtype=torch.float32, device="cpu")
    load_safetensors(other, tmp_path)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    state = theirs.state_dict()
    lost = ours.model.checkpoint_name("layers.1.self_attn.o_proj.weight")
    del state[lost]
    with pytest.raises(ConfigError, match=f"the state dict lacks: {lost}"):
        load_state_dict(ours, state)


@pytest.mark.parametrize("family", MAIN)
def test_an_estimate_is_refused_in_a_line(family):
    model = pair_of(family)[1].model
    work = Inference(batch=1, prompt_tokens=8)
    with pytest.raises(ConfigError, match="runtime=attnlab does not plan bidirectional") as caught:
        planner.estimate(model, work, Deployment(gpu="h200", runtime="attnlab"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (hf.BertForPreTraining, WORDS, "run cls.seq_relationship.weight of bert"),
        (hf.BertForMultipleChoice, WORDS, "run classifier.weight of bert"),
        (hf.BertForMaskedLM, {**WORDS, "tie_word_embeddings": False}, "predictions.decoder.bias"),
        (hf.MPNetModel, WORDS, "run encoder.relative_attention_bias.weight of mpnet"),
        (hf.ViTForMaskedImageModeling, IMAGE, "run vit.embeddings.mask_token of vit"),
        (hf.DebertaV2Model, WORDS, "run bidirectional encoders of deberta-v2"),
        (hf.Dinov2Model, {**IMAGE, "mlp_ratio": 2}, "encoders of dinov2"),
        (hf.CLIPVisionModel, {"image_size": 24, "patch_size": 4}, "of clip_vision_model"),
    ],
)
def test_what_does_not_run_is_refused_by_name(kind, config, message):
    config = kind.config_class(**config)
    config.architectures = [kind.__name__]
    with pytest.raises(ConfigError, match=message) as caught:
        EncoderModel(described(config), dtype=torch.float32, device="cpu")
    assert "\n" not in str(caught.value)


def test_inputs_that_cannot_be_are_refused():
    bert, modern, vit = (pair_of(family)[1] for family in ("bert", "modernbert", "vit, images"))
    ids, pixels = inputs_of(bert.model), inputs_of(vit.model)
    with pytest.raises(ConfigError, match=r"ids \[13\] of torch.int64 are not allowed"):
        bert(ids[0])
    with pytest.raises(ConfigError, match=r"ids \[3, 2, 12, 9\] of torch.float32 are not"):
        bert(pixels)
    with pytest.raises(ConfigError, match="65 reaches beyond max_position_embeddings=64"):
        bert(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"tokens=\[14, 2, 2\] are not allowed"):
        bert(ids, tokens=[14, 2, 2])
    with pytest.raises(ConfigError, match=r"^tokens=\[3, 0, 2\] are not allowed: one at least"):
        bert(ids, tokens=[3, 0, 2])
    with pytest.raises(ConfigError, match=r"token_types \[3, 12\] of torch.int64 are not"):
        bert(ids, token_types=ids[:, 1:])
    with pytest.raises(ConfigError, match="token_types are not allowed: None, modernbert has"):
        modern(ids, token_types=ids)
    with pytest.raises(ConfigError, match="of this class has no pooler"):
        modern.pooled(modern(ids))
    with pytest.raises(ConfigError, match=r"pixels \[3, 2, 12\] are not .* \[batch, 2, 12, 9\]"):
        vit(pixels[..., 0])
    with pytest.raises(ConfigError, match=r"pixels \[3, 2, 9, 12\] are not allowed"):
        vit(pixels.transpose(2, 3))
    with pytest.raises(ConfigError, match=r"tokens are not allowed with pixels: None"):
        vit(pixels, tokens=[1, 1, 1])
    with pytest.raises(ConfigError, match="checkpointing='some' is not allowed"):
        bert(ids, checkpointing="some")


def test_an_encoder_and_a_decoder_name_each_other():
    settings = dict(dtype=torch.float32, device="cpu")
    with pytest.raises(ConfigError, match="model_type=bert is an encoder: EncoderModel runs it"):
        Transformer(pair_of("bert, words")[1].model, **settings)
    decoder = described(hf.GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="model_type=gpt2 is a decoder: Transformer runs it"):
        EncoderModel(decoder, **settings)


def test_the_kernel_that_runs_is_that_of_all_tokens():
    bert, modern = pair_of("bert")[1], pair_of("modernbert")[1]
    assert backend_name(bert, tokens=9) == "sdpa:flash_cpu"
    assert backend_name(modern, tokens=9).startswith("sdpa:")
    assert backend_name(twin(bert, attention="naive")) == "naive"


def test_an_encoder_has_no_cache_to_build():
    with pytest.raises(ConfigError, match="model_type=vit is an encoder: it runs without a cache"):
        build_cache(
            pair_of("vit")[1].model, None, batch=1, tokens=4, dtype=torch.float32, device="cpu"
        )


def test_nothing_is_made_on_another_device_first():
    made = EncoderModel(pair_of("vit")[1].model, dtype=torch.float16, device="meta")
    assert {p.device.type for p in made.parameters()} == {"meta"}
    assert {p.dtype for p in made.parameters()} == {torch.float16}
    assert made.ends.patches.image_size == SIDE
