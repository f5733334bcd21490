"""The order of a module's tensors against transformers' classes on the meta device."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from hypothesis import given

import planner
from attnlab.transformer import Transformer
from planner.module_order import module_order
from tests.attnlab.families import FAMILIES
from tests.planner.small_decoders import KINDS, LATENT, decoders, described
from tests.properties import examples


@examples(150)
@given(config=decoders((*KINDS, *LATENT)))
def test_tensors_stand_as_in_the_class(config):
    with torch.device("meta"):
        live = hf.AutoModelForCausalLM.from_config(described(config))
    model = planner.read_config(live.config.to_dict())
    ordered = module_order(model.parameters(), model, runtime="transformers")
    assert [whatever_way(p) for p in ordered] == [whatever_way(p) for p in live.parameters()]


def whatever_way(parameter):
    """The sizes of a tensor: GPT-2's Conv1D has a linear layer's the other way round."""
    return sorted(parameter.shape)


@pytest.mark.parametrize("kind", ["gpt_bigcode", "gpt_neox", "opt"])
def test_other_runtimes_list_them_as_they_are(kind):
    model = planner.read_config({"model_type": kind})
    ordered = module_order(model.parameters(), model, runtime="attnlab")
    block = [p for p in model.parameters() if p.layer == 0]
    assert [p for p in ordered if p.layer == 0] == block


@pytest.mark.parametrize("family", FAMILIES)
def test_attnlab_makes_its_norm_and_head_before_the_layers(family):
    model = planner.read_config(FAMILIES[family]().to_dict())
    live = Transformer(model, attention=None, dtype=torch.float32, device="meta")
    ends = [name for name, _ in live.named_parameters() if not name.startswith("layers.")]
    ordered = module_order(model.parameters(), model, runtime="attnlab")
    assert [p.name for p in ordered[: len(ends)]] == ends
