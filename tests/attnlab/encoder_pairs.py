"""Tiny configs of every encoder that attnlab runs, and pairs with the same weights."""

from functools import cache

import torch
import transformers as hf

import planner
from attnlab.encoder import EncoderModel
from attnlab.weights import load_state_dict

V, LENGTH, SIDE = 97, 13, (12, 9)
SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40)
WORDS = dict(
    **SIZES, vocab_size=V, max_position_embeddings=64, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, pad_token_id=0,
)  # fmt: skip
MODERN = dict(
    **{**SIZES, "num_hidden_layers": 4}, vocab_size=V, max_position_embeddings=64,
    local_attention=6, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
DISTIL = dict(
    vocab_size=V, dim=32, n_layers=2, n_heads=4, hidden_dim=40, max_position_embeddings=64,
    dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
IMAGE = dict(
    **SIZES, image_size=list(SIDE), patch_size=[4, 3], num_channels=2, hidden_dropout_prob=0.0
)
BIASED = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
ROBERTA = {**WORDS, "pad_token_id": 1}
FAMILIES = {
    "bert": (hf.BertModel, WORDS),
    "bert, words": (hf.BertForMaskedLM, WORDS),
    "bert, relu": (hf.BertForMaskedLM, {**WORDS, "hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "bert, sequences": (hf.BertForSequenceClassification, {**WORDS, "num_labels": 3}),
    "bert, tokens": (hf.BertForTokenClassification, {**WORDS, "num_labels": 5}),
    "bert, sentences": (hf.BertForNextSentencePrediction, WORDS),
    "roberta": (hf.RobertaModel, ROBERTA),
    "roberta, words": (hf.RobertaForMaskedLM, ROBERTA),
    "roberta, sequences": (hf.RobertaForSequenceClassification, ROBERTA),
    "xlm-roberta, words": (hf.XLMRobertaForMaskedLM, ROBERTA),
    "distilbert": (hf.DistilBertModel, DISTIL),
    "distilbert, words": (hf.DistilBertForMaskedLM, DISTIL),
    "distilbert, untied": (hf.DistilBertForMaskedLM, {**DISTIL, "tie_word_embeddings": False}),
    "distilbert, sequences": (hf.DistilBertForSequenceClassification, DISTIL),
    "modernbert": (hf.ModernBertModel, MODERN),
    "modernbert, words": (hf.ModernBertForMaskedLM, MODERN),
    "modernbert, biased": (
        hf.ModernBertForMaskedLM,
        {**MODERN, **BIASED, "tie_word_embeddings": False, "local_attention": 3},
    ),
    "modernbert, first": (hf.ModernBertForSequenceClassification, MODERN),
    "modernbert, mean": (
        hf.ModernBertForSequenceClassification,
        {**MODERN, "classifier_pooling": "mean", "classifier_activation": "relu"},
    ),
    "modernbert, tokens": (hf.ModernBertForTokenClassification, MODERN),
    "vit": (hf.ViTModel, {**IMAGE, "pooler_output_size": 7}),
    "vit, relu": (hf.ViTModel, {**IMAGE, "pooler_act": "relu", "qkv_bias": False}),
    "vit, images": (hf.ViTForImageClassification, {**IMAGE, "num_labels": 5}),
    "vit, no labels": (hf.ViTForImageClassification, {**IMAGE, "num_labels": 0}),
}


@cache
def pair_of(family):
    """A tiny random model of transformers (eager, float32) and ours with the same weights."""
    kind, values = FAMILIES[family]
    config = kind.config_class(**values)
    config.architectures, config._attn_implementation = [kind.__name__], "eager"
    theirs = kind(config).eval()
    torch.manual_seed(3)
    for name, p in theirs.named_parameters():
        norm = "norm" in name.lower() and name.endswith("weight")
        torch.nn.init.normal_(p, mean=float(norm), std=0.2)
    ours = EncoderModel(described(config), dtype=torch.float32, device="cpu")
    load_state_dict(ours, theirs.state_dict())
    return theirs, ours.requires_grad_(False)


def described(config):
    """The planner's Model of a config of transformers."""
    return planner.read_config(config.to_dict() | {"architectures": config.architectures})


def inputs_of(model):
    """Token ids [3, LENGTH] without padding, or pixels [3, 2, 12, 9]."""
    generator = torch.Generator().manual_seed(1)
    if model.ends.patches is not None:
        return torch.randn(3, 2, *SIDE, generator=generator)
    return torch.randint(2, V, (3, LENGTH), generator=generator)


def theirs_of(theirs, inputs, tokens=None, **more):
    """(what the class is for: logits, or hidden states; what its pooler makes or None)."""
    if tokens is not None:
        more["attention_mask"] = padding_mask(tokens, inputs.shape[1])
    with torch.no_grad():
        out = theirs(inputs, **more)
    made = out.logits if "logits" in out else out.last_hidden_state
    return made, out.get("pooler_output")


def padding_mask(tokens, length):
    """1 where a real token stands, as transformers takes it."""
    return (torch.arange(length) < torch.tensor(tokens)[:, None]).long()
