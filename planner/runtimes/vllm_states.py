"""The state that vLLM keeps for a request in a layer without keys and values.

MambaStateShapeCalculator and MambaStateDtypeCalculator, model_executor/layers/mamba/mamba_utils.py,
vLLM 0.19.1. A convolution keeps its last K − 1 inputs (transformers: K). Everything is in the
model's dtype, recurrent states too, but for the types of `_recurrent_bytes`.
"""

from __future__ import annotations

from planner.dtypes import element_bytes, from_torch_name
from planner.mixers import Mixer
from planner.mixers.linear import GatedDeltaNet, KimiDelta, LightningAttention
from planner.mixers.mamba import Mamba, Mamba2
from planner.mixers.recurrent import ShortConv
from planner.model import Model

SERVED_TYPES = frozenset(
    (
        *("mamba", "falcon_mamba", "mamba2", "jamba", "bamba", "falcon_h1", "granitemoehybrid"),
        *("nemotron_h", "zamba2", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"),
        *("kimi_linear", "minimax", "lfm2", "lfm2_moe"),
    )
)
"""Text types with such layers in vLLM's registry (model_executor/models/registry.py)."""


def state_bytes(model: Model, mixer: Mixer, dtype: str) -> int | None:
    """Bytes of one request's state in one layer; None for what vLLM 0.19 does not serve.

    Mamba         (K − 1) · I  +  I · N
    Mamba-2       (K − 1) · (H · d + 2 · groups · N)  +  H · d · N
    DeltaNet      (K − 1) · (2 · H_k · d_k + H_v · d_v)  +  H_v · d_v · d_k
    Kimi Delta    (K − 1) · 3 · H · d  +  H · d · d, the latter in float32
    lightning     H · d · d
    convolution   (K − 1) · hidden_size
    """
    if model.text_type not in SERVED_TYPES:
        return None
    b, recurrent_b = element_bytes(dtype), _recurrent_bytes(model, dtype)
    match mixer:
        case Mamba(intermediate_size=i, state_size=N, conv_kernel=K):
            return (K - 1) * i * b + i * N * recurrent_b
        case Mamba2(num_heads=H, head_dim=D, state_size=N, conv_kernel=K):
            return (K - 1) * mixer.conv_dim * b + H * D * N * recurrent_b
        case GatedDeltaNet(
            linear_num_key_heads=H_k,
            linear_num_value_heads=H_v,
            linear_key_head_dim=d_k,
            linear_value_head_dim=d_v,
            linear_conv_kernel_dim=K,
        ):
            channels = 2 * H_k * d_k + H_v * d_v
            return (K - 1) * channels * b + H_v * d_v * d_k * recurrent_b
        case KimiDelta(linear_num_heads=H, linear_head_dim=D, linear_conv_kernel_dim=K):
            return (K - 1) * 3 * H * D * b + H * D * D * recurrent_b
        case LightningAttention(num_attention_heads=H, head_dim=D):
            return H * D * D * b
        case ShortConv(hidden_size=h, conv_kernel=K):
            return (K - 1) * h * b
    return None


def _recurrent_bytes(model: Model, dtype: str) -> int:
    """Element size of a recurrent state: that of `--mamba-ssm-cache-dtype auto`.

    Kimi Delta: float32 (kda_state_dtype). nemotron_h and qwen3_5: what their config.json says
    (NemotronHForCausalLMConfig, Qwen3_5ForConditionalGenerationConfig in models/config.py);
    nemotron_h without a word: float16.
    """
    config = model.config
    if model.text_type == "kimi_linear":
        return element_bytes("fp32")
    if model.text_type == "nemotron_h":
        given = config.get("mamba_ssm_cache_dtype", "float16")
        return element_bytes(from_torch_name(given, field="mamba_ssm_cache_dtype"))
    if model.text_type in ("qwen3_5_text", "qwen3_5_moe_text"):
        given = config.get("text_config", config).get("mamba_ssm_dtype")
        if given is not None:
            return element_bytes(from_torch_name(given, field="mamba_ssm_dtype"))
    return element_bytes(dtype)
