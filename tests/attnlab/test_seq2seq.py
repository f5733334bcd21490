"""Encoder–decoders against transformers: logits, gradients, generation, every cache."""

import pytest
import torch
import transformers as hf

import planner
from attnlab.backend import backend_name
from attnlab.caches import build_cache
from attnlab.generate import generate
from attnlab.seq2seq import EncoderDecoder
from attnlab.training import IGNORED, next_token_loss
from attnlab.transformer import Transformer
from attnlab.weights import load_safetensors, load_state_dict
from planner import CacheSpec, ConfigError
from tests.attnlab.encoder_decoders import FAMILIES, V, inputs_of, padding_mask, pair_of, theirs_of
from tests.attnlab.rounding import assert_as_near, in_bfloat16
from tests.attnlab.test_caches import CHUNKS, KINDS, LENGTH, cache_of

CLOSE = dict(rtol=1e-4, atol=2e-5)
TEXT = [family for family in FAMILIES if family != "whisper"]
FEW = ["t5", "bart", "whisper"]


@pytest.fixture(params=FAMILIES)
def pair(request):
    return pair_of(request.param)


@pytest.fixture
def ids():
    return torch.randint(3, V, (2, LENGTH), generator=torch.Generator().manual_seed(4))


def twin(ours, **settings):
    settings = dict(dtype=torch.float32, device="cpu") | settings
    other = EncoderDecoder(ours.model, **settings)
    other.load_state_dict(ours.state_dict())
    return other.requires_grad_(False)


def test_logits_equal_those_of_transformers(pair, ids):
    theirs, ours = pair
    inputs = inputs_of(ours.model)
    with torch.no_grad():
        expected = theirs_of(theirs, ids, inputs)
    torch.testing.assert_close(ours(ids, encoder_inputs=inputs), expected, **CLOSE)
    states = ours.encode(inputs)
    with torch.no_grad():
        encoder = theirs.get_encoder()
        torch.testing.assert_close(states, encoder(inputs).last_hidden_state, **CLOSE)
    assert torch.equal(ours(ids, encoder_states=states), ours(ids, encoder_inputs=inputs))


@pytest.mark.parametrize("family", TEXT)
def test_padding_of_the_encoder_is_hidden_as_in_transformers(family, ids):
    theirs, ours = pair_of(family)
    inputs, real = inputs_of(ours.model), [9, 4]
    with torch.no_grad():
        expected = theirs_of(theirs, ids, inputs, real)
    made = ours(ids, encoder_inputs=inputs, encoder_tokens=real)
    torch.testing.assert_close(made, expected, **CLOSE)
    alone = ours(ids[1:], encoder_inputs=inputs[1:, :4])
    torch.testing.assert_close(made[1:], alone, **CLOSE)


def test_naive_and_sdpa_agree(pair, ids):
    _, ours = pair
    inputs = inputs_of(ours.model)
    naive = twin(ours, attention="naive")(ids, encoder_inputs=inputs)
    torch.testing.assert_close(naive, ours(ids, encoder_inputs=inputs), **CLOSE)


@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(pair, ids, attention):
    theirs, ours = pair
    inputs = inputs_of(ours.model)
    exact = ours(ids, encoder_inputs=inputs)
    rounded = twin(ours, attention=attention, dtype=torch.bfloat16)(ids, encoder_inputs=inputs)
    theirs_inputs = inputs if inputs.dtype == torch.long else inputs.bfloat16()
    with torch.no_grad():
        assert_as_near(rounded, theirs_of(in_bfloat16(theirs), ids, theirs_inputs), exact)


def test_parameters_are_those_the_planner_counts(pair):
    theirs, ours = pair
    built = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    assert built == {p.name: p.shape for p in ours.model.parameters()}
    table = {p.name: p.shape for p in ours.model.checkpoint_parameters()}
    assert table == {name: tuple(p.shape) for name, p in theirs.named_parameters()}


@pytest.mark.parametrize("family", ["t5", "t5 v1.1", "umt5", "bart"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_loss_and_gradients_equal_those_of_transformers(family, checkpointing, ids):
    theirs, ours = pair_of(family)
    ours = twin(ours, attention="naive").requires_grad_(True)
    inputs, real = inputs_of(ours.model), [9, 4]
    mask = padding_mask(real, 9)
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    theirs.zero_grad()
    expected = theirs(
        input_ids=inputs, attention_mask=mask, decoder_input_ids=ids, labels=labels
    ).loss
    expected.backward()
    logits = ours(ids, encoder_inputs=inputs, encoder_tokens=real, checkpointing=checkpointing)
    loss = next_token_loss(logits, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    made = {name: p.grad for name, p in ours.named_parameters()}
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    names = zip(ours.model.parameters(), ours.model.checkpoint_parameters(), strict=True)
    for here, there in names:
        torch.testing.assert_close(made[here.name], wanted[there.name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("family", FEW)
def test_any_chunking_over_any_cache_equals_one_pass(family, kind, chunks, ids):
    ours = pair_of(family)[1]
    inputs, tokens = inputs_of(ours.model), None if family == "whisper" else [9, 4]
    expected = ours(ids, encoder_inputs=inputs, encoder_tokens=tokens)
    cache, given = cache_of(kind, ours.model), {}
    if kind == "paged":
        ours.read(inputs, cache, tokens=tokens)
    else:
        given = dict(encoder_inputs=inputs, encoder_tokens=tokens)
    parts = []
    for part in ids.split(chunks, dim=1):
        parts.append(ours(part, cache=cache, **given))
        given = {}
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fixed shapes"])
@pytest.mark.parametrize("family", FEW)
def test_ragged_passes_equal_each_sequence_alone(family, kind, ids):
    ours = pair_of(family)[1]
    inputs, cache = inputs_of(ours.model), cache_of(kind, ours.model)
    ours.read(inputs, cache)
    fed, seen = [0, 0], [[], []]
    for T, real in [(6, [6, 2]), (4, [1, 4]), (1, [1, 1]), (7, [7, 0]), (1, [1, 1])]:
        new = torch.randint(V, (2, T))
        for b, n in enumerate(real):
            new[b, :n] = ids[b, fed[b] : fed[b] + n]
        out = ours(new, cache=cache, tokens=real)
        for b, n in enumerate(real):
            seen[b].append(out[b, :n])
            fed[b] += n
    for b in range(2):
        alone = ours(ids[b : b + 1, : fed[b]], encoder_inputs=inputs[b : b + 1])
        torch.testing.assert_close(torch.cat(seen[b])[None], alone, **CLOSE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["static", "dynamic", "ring", "paged"])
@pytest.mark.parametrize("family", FEW)
def test_nbytes_are_those_the_planner_counts(family, kind, dtype):
    ours = pair_of(family)[1]
    spec, inputs = CacheSpec(kind=kind), inputs_of(ours.model)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    cache = build_cache(ours.model, spec, batch=2, tokens=7, dtype=wanted, device="cpu")
    ours(torch.zeros(2, 7, dtype=torch.long), encoder_inputs=inputs, cache=cache)
    seen = None if ours.model.encoder_tokens else 9
    assert cache.nbytes == planner.kv_cache_bytes(
        ours.model, batch=2, context_tokens=7, dtype=dtype, runtime="attnlab", cache=spec,
        encoder_tokens=seen,
    )  # fmt: skip
    held = [t for pair in cache.cross for t in pair]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in held)
    cache.reset()
    assert cache.cross == [None, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["t5", "t5 v1.1", "bart", "whisper"])
def test_greedy_generation_equals_that_of_transformers(family, kind):
    theirs, ours = pair_of(family)
    inputs, start = inputs_of(ours.model), theirs.config.decoder_start_token_id
    settings = hf.GenerationConfig(
        max_new_tokens=15, do_sample=False, num_beams=1, decoder_start_token_id=start,
        pad_token_id=0, eos_token_id=None, use_cache=True,
    )  # fmt: skip
    given, tokens = {}, None
    if family != "whisper":
        tokens = [9, 4]
        given["attention_mask"] = padding_mask(tokens, 9)
    plain = hf.GenerationMixin.generate  # whisper's own makes timestamps of segments
    expected = plain(theirs, inputs, generation_config=settings, **given)
    made = generate(
        ours, torch.full((2, 1), start), output_tokens=15,
        cache=cache_of(kind, ours.model), encoder_inputs=inputs, encoder_tokens=tokens,
    )  # fmt: skip
    assert made.tolist() == expected[:, 1:].tolist()
    assert len(set(made.flatten().tolist())) > 4


def test_checkpoints_load_from_files(tmp_path):
    for family in FEW:
        theirs, ours = pair_of(family)
        theirs.save_pretrained(tmp_path / family)
        other = EncoderDecoder(ours.model, dtype=torch.float32, device="cpu")
        load_safetensors(other, tmp_path / family)
        for name, tensor in ours.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor)
    state = pair_of("t5")[0].state_dict()
    del state["encoder.final_layer_norm.weight"]
    with pytest.raises(ConfigError, match=r"lacks: encoder\.final_layer_norm\.weight"):
        load_state_dict(pair_of("t5")[1], state)


def test_the_kernel_that_runs_sees_the_biases():
    ours = pair_of("t5")[1]
    assert backend_name(ours, batch=2, tokens=1, context_tokens=9).startswith("sdpa:")


def test_inputs_that_cannot_be_are_refused(ids):
    ours, plain = pair_of("bart")[1], pair_of("whisper")[1]
    inputs = inputs_of(ours.model)
    cache = cache_of("static", ours.model, tokens=12)
    with pytest.raises(ConfigError, match="encoder_states=None are not allowed without a cache"):
        ours(ids)
    with pytest.raises(ConfigError, match="encoder_states=None are not allowed without a cache"):
        ours(ids, cache=cache)
    with pytest.raises(ConfigError, match="are not allowed together: one"):
        ours(ids, encoder_inputs=inputs, encoder_states=ours.encode(inputs))
    with pytest.raises(ConfigError, match=r"encoder_states \[2, 9, 31\] are not allowed: \[2, "):
        ours(ids, encoder_states=torch.zeros(2, 9, 31))
    with pytest.raises(ConfigError, match=r"encoder_tokens=\[3, 0\] are not allowed"):
        ours(ids, encoder_inputs=inputs, encoder_tokens=[3, 0])
    with pytest.raises(ConfigError, match=r"0 cached \+ 23 new tokens"):
        ours(ids, encoder_inputs=inputs, cache=cache)
    assert cache.cross == [None, None]
    ours(ids[:, :5], encoder_inputs=inputs, cache=cache)
    with pytest.raises(ConfigError, match="the cache holds an encoder's keys and values"):
        ours(ids[:, :5], encoder_inputs=inputs, cache=cache)
    with pytest.raises(ConfigError, match=r"features \[2, 5, 23\] are not allowed: \[batch, 5"):
        plain.encode(torch.zeros(2, 5, 23))
    with pytest.raises(ConfigError, match="model_type=bart has an encoder: EncoderDecoder runs it"):
        Transformer(ours.model, dtype=torch.float32, device="cpu")


def test_embeddings_that_are_not_tied_are_refused():
    model = planner.read_config({**FAMILIES["bart"]().to_dict(), "tie_word_embeddings": False})
    with pytest.raises(ConfigError, match="does not run parameters outside the blocks of bart"):
        EncoderDecoder(model, dtype=torch.float32, device="cpu")
