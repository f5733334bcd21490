"""Whatever reader made it: attnlab refuses a model, or computes what its class computes."""

import pytest
import torch

import planner
from attnlab.transformer import Transformer
from attnlab.weights import load_state_dict
from planner.huggingface.fields import SAME_AS
from planner.runtimes.attnlab import missing_parts
from planner.runtimes.transformers import WINDOWED
from tests.planner.configs import TINY, build
from tests.planner.every_type import CASES as EVERY
from tests.planner.huggingface import test_readers_gpt_like as gpt_like
from tests.planner.huggingface import test_readers_later_decoders as later
from tests.planner.huggingface import test_readers_norms_and_mixtures as mixtures


def runs(config):
    """The model, if attnlab runs it. Left out: a stray window, which clips the class's cache and
    masks nothing (transformers cannot run those models); attnlab does mask.
    """
    try:
        model = planner.read_config(config)
    except planner.ConfigError:
        return None
    stray = model.text_type not in WINDOWED and any(
        getattr(layer.attention, "sliding_window", None) for layer in model.layers
    )
    runs_here = model.is_decoder and model.lm_head and not missing_parts(model)
    return model if runs_here and not stray else None


CONFIGS = {
    **{case.config["model_type"]: case.config for case in EVERY.values() if case.auto == "causal"},
    **{f"{kind} again": later.variant(kind, {}) for kind in later.TYPES},
    **{name: mixtures.config_of(name) for name in mixtures.CONFIGS},
    **{name: {"model_type": kind, **change} for name, (kind, change) in gpt_like.CASES.items()},
    **TINY,
}
CASES = {name: config for name, config in CONFIGS.items() if runs(config)}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_the_class(name):
    config = CASES[name]
    known = SAME_AS.get(config["model_type"], config["model_type"])
    live = build({**config, "model_type": known}, device="cpu", dtype=torch.float32)
    for p_name, p in live.named_parameters():
        module = ".".join(p_name.split(".")[-3:])
        norm = "norm" in module or "ln_" in module
        torch.nn.init.normal_(p, mean=float(norm and p_name.endswith("weight")), std=0.2)
    for name, buffer in live.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.2)
    ours = Transformer(planner.read_config(config), dtype=torch.float32, device="cpu")
    load_state_dict(ours, live.state_dict())
    V = ours.model.vocab_size
    ids = torch.randint(1, V, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), live(ids).logits, rtol=1e-4, atol=1e-4)


def test_many_types_run():
    assert {config["model_type"] for config in CASES.values()} >= {"llama", "nemotron", "olmo3"}
