"""Tiny models to train, by family, and what a step of them needs."""

import copy

import torch

from attnlab.seq2seq import EncoderDecoder
from attnlab.training import IGNORED, training_step
from attnlab.transformer import Transformer
from tests.attnlab import conftest, encoder_decoders

FEW = ("llama", "gemma2", "gpt2", "falcon-7b", "mixtral", "deepseek_v3", "mamba2", "t5")


def trainable(family, dtype=torch.float32, **settings):
    """Ours with the weights of the pair, gradients wanted."""
    seq2seq = family in encoder_decoders.FAMILIES
    ours = encoder_decoders.pair_of(family)[1] if seq2seq else conftest._pair(family)[1]
    built = EncoderDecoder if seq2seq else Transformer
    other = built(ours.model, dtype=dtype, device="cpu", **settings)
    other.load_state_dict(ours.state_dict())
    return other


def theirs_of(family, dtype=torch.float32):
    """That of transformers, without dropout, to be trained and thrown away."""
    seq2seq = family in encoder_decoders.FAMILIES
    theirs = encoder_decoders.pair_of(family)[0] if seq2seq else conftest._pair(family)[0]
    return copy.deepcopy(theirs).to(dtype).eval().requires_grad_(True)


def step(ours, ids, optimizer=None, *, labels=None, **how):
    """One training step on ids [B, T]; labels are the tokens after each, the last one ignored."""
    if ours.reads_encoder:
        inputs = encoder_decoders.inputs_of(ours.model)
        how |= dict(encoder_inputs=inputs, encoder_tokens=[9, 4])
    if labels is None:
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    return training_step(ours, ids, labels, optimizer, **how)


def gradients(ours):
    """Name → gradient; they are gone then."""
    made = {name: p.grad for name, p in ours.named_parameters()}
    ours.zero_grad(set_to_none=True)
    return made
