"""Tiny configs of every encoder–decoder that attnlab runs, and pairs with the same weights."""

from functools import cache

import torch
import transformers as hf

import planner
from attnlab.seq2seq import EncoderDecoder
from attnlab.weights import load_state_dict

V, FRAMES, MELS = 97, 12, 5
T5 = dict(
    vocab_size=V, d_model=32, d_kv=6, d_ff=48, num_heads=4, num_layers=3, num_decoder_layers=2,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, dropout_rate=0.0,
    pad_token_id=0, decoder_start_token_id=0,
)  # fmt: skip
STACKS = dict(
    vocab_size=V, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=48, dropout=0.0,
    pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    forced_eos_token_id=None,
)  # fmt: skip
BART = dict(**STACKS, max_position_embeddings=64)
FAMILIES = {
    "t5": lambda: hf.T5Config(**T5),
    "t5 v1.1": lambda: hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "umt5": lambda: hf.UMT5Config(**T5),
    "bart": lambda: hf.BartConfig(**BART),
    "bart, scaled": lambda: hf.BartConfig(**BART, scale_embedding=True),
    "mbart": lambda: hf.MBartConfig(**BART),
    "pegasus": lambda: hf.PegasusConfig(**BART),
    "whisper": lambda: hf.WhisperConfig(
        **STACKS, max_target_positions=64, max_source_positions=FRAMES, num_mel_bins=MELS
    ),
}
SPREAD = {
    "decoder.embed_positions": 1.0,
    "relative_attention_bias": 1.0,
    "shared": 0.1,
    "decoder.embed_tokens": 0.1,
    "out_proj": 0.1,
    "EncDecAttention.o": 0.1,
    "bias": 0.1,
}
"""Standard deviations of some weights, 0.25 of the others: so that generation repeats little."""


@cache
def pair_of(family):
    """A tiny random model of transformers (eager, float32) and ours with the same weights."""
    config = FAMILIES[family]()
    config._attn_implementation = "eager"
    auto = hf.AutoModelForSeq2SeqLM if family != "whisper" else hf.AutoModelForSpeechSeq2Seq
    theirs = auto.from_config(config).eval()
    torch.manual_seed(7)
    for name, p in theirs.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        std = next((spread for word, spread in SPREAD.items() if word in name), 0.25)
        torch.nn.init.normal_(p, mean=float(norm), std=std)
    if hasattr(theirs, "final_logits_bias"):
        theirs.final_logits_bias.normal_(std=0.1)
    ours = EncoderDecoder(planner.read_config(config.to_dict()), dtype=torch.float32, device="cpu")
    load_state_dict(ours, theirs.state_dict())
    return theirs, ours.requires_grad_(False)


def inputs_of(model):
    """Two inputs: ids [2, 9], or features [2, mels, 2 · frames]."""
    generator = torch.Generator().manual_seed(1)
    if model.encoder_tokens:
        return torch.randn(2, MELS, 2 * FRAMES, generator=generator)
    return torch.randint(3, V, (2, 9), generator=generator)


def theirs_of(theirs, ids, inputs, tokens=None, **more):
    """Logits of transformers for the same decoder ids and inputs."""
    name = "input_ids" if inputs.dim() == 2 else "input_features"
    if tokens is not None:
        more["attention_mask"] = padding_mask(tokens, inputs.shape[1])
    return theirs(decoder_input_ids=ids, **{name: inputs}, **more).logits


def padding_mask(tokens, length):
    """1 where a real token stands, as transformers takes it."""
    return (torch.arange(length) < torch.tensor(tokens)[:, None]).long()
