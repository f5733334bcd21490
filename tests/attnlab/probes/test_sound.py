"""Classes of transformers, built from small configs: nothing critical or high is found."""

import pytest
import torch
import transformers as hf

from attnlab.probes import check

BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**BASE, "num_key_value_heads": 2}
GPT = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

SOUND = {
    # decoders
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT)),
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
                        attention_types=[[["global", "local"], 1]], max_position_embeddings=64)
    ),
    "openai-gpt": lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**GPT)),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    ),
    "mpt": lambda: hf.MptForCausalLM(
        hf.MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                     num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=8)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, pad_token_id=0)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        alibi=True, multi_query=False, parallel_attn=False)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**GROUPED, **EXPERTS)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
                        sliding_window=8)
    ),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**BASE, num_key_value_heads=4, moe_intermediate_size=16,
                            n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
                            kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
                            qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1)
    ),
    # encoders: both directions are right
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**BASE)),
    "bert as a decoder": lambda: hf.BertLMHeadModel(hf.BertConfig(**BASE, is_decoder=True)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**BASE)),
    "deberta": lambda: hf.DebertaV2Model(
        hf.DebertaV2Config(**BASE, relative_attention=True, pos_att_type=["p2c", "c2p"],
                           position_buckets=16)
    ),
    # encoder–decoders
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    # hybrids and recurrences
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "rwkv": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, context_length=64)
    ),
    "bamba": lambda: hf.BambaForCausalLM(
        hf.BambaConfig(**GROUPED, **MAMBA, attn_layer_indices=[1])
    ),
    "lfm2": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"])
    ),
    "recurrent_gemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(vocab_size=97, hidden_size=32, intermediate_size=48,
                                num_hidden_layers=3, num_attention_heads=4, lru_width=32,
                                num_key_value_heads=1, attention_window_size=8)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_class_of_transformers_passes(kind):
    torch.manual_seed(0)
    found = check(SOUND[kind]())
    assert [f for f in found if f.fails or f.id == "not-checked"] == []
