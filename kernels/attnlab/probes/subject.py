"""What is probed: a module that takes token ids or embeddings, and what is known about it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab.probes.quiet import NoDropout
from planner.errors import ConfigError, shown

# Shapes.  B batch · S tokens · D width of embeddings

TOKENS = 23  # a prime, so that no other size is taken for the sequence
SHORTER = (13, 7)
ENCODER_TOKENS = 17
BIDIRECTIONAL = re.compile(r"Encoder|Bert|BERT|Bidirectional|Masked|Classif|ViT|Vision")
CACHE_NAMES = ("past_key_values", "cache_params", "past_key_value", "past")
SPECIAL = re.compile(r"(^|_)(token_id|token_index)$")


class _FindTable(TorchDispatchMode):
    """Rows of the table that the ids themselves are looked up in."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.ids, self.rows = ids, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Watch aten.embedding."""
        if func is torch.ops.aten.embedding.default and not self.rows:
            weight, indices = args[0], args[1]
            if indices.shape == self.ids.shape and torch.equal(indices.to(self.ids), self.ids):
                self.rows = int(weight.shape[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A module with what the probes ask of it.

    `causal`: earlier outputs must not depend on later tokens. `sequence` names the argument that
    the probes vary, `fixed` what goes along with every call.
    """

    module: nn.Module
    config: Any
    takes: Literal["ids", "embeddings"]
    causal: bool
    device: torch.device
    width: int
    sequence: str
    accepts: frozenset[str]
    vocabulary: int = 0
    avoid: frozenset[int] = frozenset()
    encoder: bool = False
    uncached: bool = False  # plain forwards are asked for without a cache
    trained_tokens: int | None = None
    tokens: int = TOKENS
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, batch: int, tokens: int, seed: int = 0) -> Tensor:
        """Token ids [B, S] without special ones, or embeddings [B, S, D]."""
        generator = torch.Generator().manual_seed(seed)
        if self.takes == "embeddings":
            drawn = torch.randn(batch, tokens, self.width, generator=generator)
            return drawn.to(self.device, self.dtype)
        plain = torch.tensor(
            [i for i in range(min(self.vocabulary, 1 << 16)) if i not in self.avoid]
        )
        chosen = torch.randint(len(plain), (batch, tokens), generator=generator)
        return plain[chosen].to(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of its first floating-point parameter."""
        found = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return next(found, torch.float32)

    @property
    def tolerance(self) -> float:
        """What rounding may move an output by, relative to the largest."""
        return 1e-5 if self.dtype in (torch.float32, torch.float64) else 2e-2

    def has(self, argument: str) -> bool:
        """Whether its forward takes this argument by name."""
        return argument in self.accepts

    def run(self, inputs: Tensor, **more: Any) -> Any:
        """The module's own answer, the same random numbers each time."""
        torch.default_generator.manual_seed(0)  # torch.manual_seed writes its stack down each time
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)
        fixed = {
            name: value.expand(len(inputs), *value.shape[1:]) for name, value in self.fixed.items()
        }
        if self.uncached and "use_cache" not in more:
            more["use_cache"] = False
        with NoDropout():
            if self.sequence:
                return self.module(**{self.sequence: inputs}, **fixed, **more)
            return self.module(inputs, **fixed, **more)

    def outputs(self, inputs: Tensor, **more: Any) -> Tensor:
        """Its outputs [B, S, …] without gradients."""
        with torch.no_grad():
            return output_of(self.run(inputs, **more), inputs)


def output_of(answer: Any, inputs: Tensor) -> Tensor:
    """The tensor [B, S, …] of an answer: itself, `.logits`, `.last_hidden_state`, or the first."""
    found = answer
    if isinstance(answer, Mapping):
        found = answer.get("logits", answer.get("last_hidden_state"))
    elif not isinstance(answer, Tensor):
        for name in ("logits", "last_hidden_state"):
            if isinstance(getattr(answer, name, None), Tensor):
                found = getattr(answer, name)
                break
    if isinstance(found, tuple | list) and found and isinstance(found[0], Tensor):
        found = found[0]
    B, S = inputs.shape[:2]
    if not isinstance(found, Tensor) or found.dim() < 3 or found.shape[:2] != (B, S):
        got = f"{list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"the module returned {got}: a tensor [{B}, {S}, …] or an object with .logits or "
            ".last_hidden_state is needed"
        )
    return found


def examine(
    module: nn.Module,
    *,
    takes: str = "ids",
    causal: bool | None = None,
    vocab_size: int | None = None,
    width: int | None = None,
    trained_tokens: int | None = None,
    sample: Tensor | None = None,
) -> Probed:
    """What kind of module it is; ConfigError in one line for one that cannot be run."""
    if not isinstance(module, nn.Module):
        raise ConfigError(f"module={shown(module)} is not allowed: an nn.Module")
    if takes not in ("ids", "embeddings"):
        raise ConfigError(f"takes={shown(takes)} is not allowed: ids or embeddings")
    if sample is not None:
        takes = "embeddings" if sample.is_floating_point() else "ids"
        width = sample.shape[-1] if sample.is_floating_point() else width
    config = text_config(module)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise ConfigError("the module lies on the meta device: a device that computes is needed")
    names = arguments(module)
    encoder = bool(value(config, "is_encoder_decoder")) and "decoder_input_ids" in names
    sequence = "decoder_input_ids" if encoder else "input_ids" if "input_ids" in names else ""
    if takes == "embeddings":
        sequence = "inputs_embeds" if "inputs_embeds" in names else ""
        sizes = ("hidden_size", "n_embd", "d_model", "dim")
        width = width or next((n for s in sizes if (n := whole(value(config, s)))), None)
        width = width or first_width(module)
    elif not sequence and names and names[0] in ("pixel_values", "input_features", "input_values"):
        raise ConfigError(f"the module takes {names[0]}: token ids or embeddings are needed")
    rows = vocab_size or whole(value(config, "vocab_size")) or 0
    fixed = {}
    if encoder:
        known = max(rows or 0, 8)
        fixed["input_ids"] = torch.arange(3, 3 + ENCODER_TOKENS, device=device)[None] % known
    probed = Probed(
        module=module,
        config=config,
        takes=takes,  # type: ignore[arg-type]
        causal=is_causal(module, config) if causal is None else causal,
        device=device,
        width=width or 0,
        sequence=sequence,
        accepts=frozenset(names),
        vocabulary=rows,
        avoid=special_ids(config) if rows > 16 else frozenset(),
        encoder=encoder,
        uncached=type(module).__module__.startswith("transformers.") and "use_cache" in names,
        trained_tokens=trained_tokens or trained_length(config),
        fixed=fixed,
    )
    if probed.trained_tokens is not None:
        probed = replace(probed, tokens=min(TOKENS, probed.trained_tokens))
    return probed if probed.vocabulary or takes == "embeddings" else with_table(probed)


def runs(probed: Probed) -> tuple[Probed, Tensor]:
    """The probed module at a length that it takes, and its outputs there; ConfigError for none."""
    failed: Exception | None = None
    for tokens in (probed.tokens, *SHORTER):
        shorter = replace(probed, tokens=min(tokens, probed.tokens))
        try:
            return shorter, shorter.outputs(shorter.draw(2, shorter.tokens))
        except ConfigError:
            raise
        except Exception as error:
            failed = failed or error
    what = "token ids" if probed.takes == "ids" else "embeddings"
    raise ConfigError(
        told(f"the module fails on {what} [2, {probed.tokens}]", failed or ValueError())
    )


def with_table(probed: Probed) -> Probed:
    """With the vocabulary of the table that the ids are looked up in."""
    ids = torch.randint(2, (2, SHORTER[-1]), generator=torch.Generator().manual_seed(5)).to(
        probed.device
    )
    finder = _FindTable(ids)
    try:
        with finder:
            probed.outputs(ids)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(told("the module cannot be run on token ids", error)) from None
    if not finder.rows:
        raise ConfigError("no embedding receives the token ids: say vocab_size=, or embeddings")
    return replace(probed, vocabulary=finder.rows)


def told(what: str, error: BaseException) -> str:
    """An error in one short line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return f"{what}: {type(error).__name__}: {words[:160]}"


def text_config(module: nn.Module) -> Any:
    """The module's config, of the language model inside where it is one of several."""
    described = getattr(module, "model", None)
    if type(described).__name__ == "Model" and isinstance(getattr(described, "config", None), dict):
        return described.config
    config = getattr(module, "config", None)
    inner = getattr(config, "get_text_config", None)
    if callable(inner) and not value(config, "is_encoder_decoder"):
        config = inner()
    return config


def value(config: Any, name: str) -> Any:
    """A field of a config that is an object, a dict, or absent."""
    if isinstance(config, Mapping):
        return config.get(name)
    return getattr(config, name, None)


def whole(number: Any) -> int | None:
    """A whole number above zero."""
    return (
        number if isinstance(number, int) and not isinstance(number, bool) and number > 0 else None
    )


def trained_length(config: Any) -> int | None:
    """The positions that a config names."""
    names = ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len")
    return next((n for name in names if (n := whole(value(config, name)))), None)


def special_ids(config: Any) -> frozenset[int]:
    """Ids with a meaning of their own: padding, ends, images."""
    fields = vars(config) if config is not None and hasattr(config, "__dict__") else config or {}
    found: set[int] = set()
    for name, content in dict(fields).items():
        if isinstance(name, str) and SPECIAL.search(name):
            ids = content if isinstance(content, list | tuple) else [content]
            found.update(i for i in ids if isinstance(i, int) and not isinstance(i, bool))
    return frozenset(found)


def arguments(module: nn.Module) -> list[str]:
    """Names of what its forward takes."""
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return []
    return [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def first_width(module: nn.Module) -> int:
    """Width that the first norm or linear takes."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            return m.in_features
        if isinstance(m, nn.LayerNorm):
            return int(m.normalized_shape[-1])
    raise ConfigError("width is not known: say how wide the embeddings are")


def is_causal(module: nn.Module, config: Any) -> bool:
    """Whether earlier outputs must not see later tokens, by what the module says of itself."""
    described = getattr(module, "model", None)
    if type(described).__name__ == "Model" and hasattr(described, "is_decoder"):
        return bool(described.is_decoder)
    if type(module).__module__.startswith("transformers."):
        return _transformers_causal(module, config)
    for name in ("is_decoder", "causal", "is_causal"):
        stated = value(config, name)
        if isinstance(stated, bool):
            return stated
    return not BIDIRECTIONAL.search(type(module).__name__)


def _transformers_causal(module: nn.Module, config: Any) -> bool:
    # asked for only by a module of its own
    from transformers.models.auto import modeling_auto as auto  # noqa: TID251

    if value(config, "is_encoder_decoder"):
        return True
    if value(config, "use_bidirectional_attention") or value(config, "is_causal") is False:
        return False
    kind, masked = value(config, "model_type"), auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if kind == "xlnet" or kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        stated = value(config, "is_decoder")
        return bool(stated) and kind != "xlnet"
    return bool(value(config, "is_decoder")) if kind in masked else True
