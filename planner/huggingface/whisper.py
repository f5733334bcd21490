"""Reader of whisper: two convolutions before an encoder of fixed length, Bart's blocks.

It follows models/whisper/ of transformers 5.23.
"""

from __future__ import annotations

from dataclasses import replace

from planner.huggingface.bart_like import NORM, encoder_tower, names, stack_of
from planner.huggingface.fields import Fields
from planner.huggingface.heads import dense, described, label_count, named_class, padding
from planner.layers import LearnedPositions
from planner.model import Model
from planner.parameters import norm_parameters
from planner.tensors import Parameter, tensor

ENDINGS = ("ForConditionalGeneration", "Model", "ForAudioClassification")
PAD_TOKEN = 50256
STRIDES = (1, 2)


def read_whisper(fields: Fields) -> Model:
    """Whisper: keys without bias; every audio is padded to `max_source_positions` frames."""
    ending = named_class(fields, "Whisper", ENDINGS)
    if ending == "ForAudioClassification":
        return _classifier(fields)
    padding(fields, absent=PAD_TOKEN)
    h, frames = fields.size("hidden_size"), fields.size("max_source_positions")
    lm_head = ending == "ForConditionalGeneration"
    root = "model." if lm_head else ""
    outer = [
        *_convolutions(fields),
        tensor("embed_positions.weight", frames, h),  # sinusoids, but a parameter
        *norm_parameters(NORM, "norm", h),
    ]
    tower = encoder_tower(fields, root, outer, before=True, unbiased="k")
    front = tuple((name, f"{root}encoder.{name}") for name in ("conv1", "conv2"))
    return described(
        fields,
        layers=stack_of(fields, "decoder", before=True, unbiased="k"),
        final_norm=NORM,
        positions=LearnedPositions(),
        max_position_embeddings=fields.size("max_target_positions"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        lm_head=lm_head,
        encoder_tokens=frames,
        parameter_names=(
            ("embed_tokens", f"{root}decoder.embed_tokens"),
            ("lm_head", "proj_out"),
            *names(root, "decoder", before=True),
        ),
        towers=(
            replace(
                tower,
                parameter_names=(*front, *tower.parameter_names),
                positions=LearnedPositions(),
                strides=STRIDES,
            ),
        ),
    )


def _classifier(fields: Fields) -> Model:
    """The encoder alone, a projection and a classifier over the mean of its frames."""
    h, width = fields.size("hidden_size"), fields.size("classifier_proj_size")
    layers = stack_of(fields, "encoder", before=True, unbiased="k")
    extra = [replace(p, name=f"encoder.{p.name}") for p in _convolutions(fields)]
    if fields.flag("use_weighted_layer_sum"):
        extra.append(tensor("layer_weights", len(layers) + 1, group="head"))
    extra += dense("projector", out=width, into=h)
    extra += dense("classifier", out=label_count(fields), into=width)
    return described(
        fields,
        layers=layers,
        final_norm=NORM,
        positions=LearnedPositions(),
        max_position_embeddings=fields.size("max_source_positions"),
        vocab_size=0,
        tie_word_embeddings=True,
        lm_head=False,
        is_decoder=False,
        extra_parameters=tuple(extra),
        parameter_names=names("", "encoder", before=True),
    )


def _convolutions(fields: Fields) -> list[Parameter]:
    """Spectrogram to frames: three wide, the second one at stride two."""
    h, found = fields.size("hidden_size"), []
    for name, channels in (("conv1", fields.size("num_mel_bins")), ("conv2", h)):
        found.append(tensor(f"{name}.weight", h, channels, 3, group="encoder"))
        found.append(tensor(f"{name}.bias", h, group="encoder"))
    return found


READERS = {"whisper": read_whisper}
