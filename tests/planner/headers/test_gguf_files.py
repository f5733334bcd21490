"""Oracles: gguf's own writer and reader, the class in transformers, transformers' GGUF configs."""

from __future__ import annotations

import json
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

import planner
from planner import ConfigError
from planner.cli.commands import main
from planner.huggingface.gguf import ARCHITECTURES
from tests.planner.checkpoints.test_checkpoint import MIB, refusal
from tests.planner.configs import BASE, TINY, build
from tests.planner.huggingface import test_readers_later_decoders as later
from tests.planner.huggingface import test_readers_norms_and_mixtures as norms
from tests.planner.oracle import assert_same_parameters
from tests.properties import examples

LLAMA = {**TINY["llama"], "rms_norm_eps": 1e-5}
MIXTURE = {"expert_count": 4, "expert_used_count": 2}
LATENT = TINY["deepseek_v3"]
# architecture, config, and the metadata that llama.cpp's converter adds to the common ones
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", LLAMA, {"rope.dimension_count": 16}),
    "llama biased, tied": (
        "llama",
        TINY["llama with biases, tied"],
        {"rope.dimension_count": 16},
    ),
    "llama wide heads": ("llama", {**LLAMA, "head_dim": 24}, {"attention.key_length": 24}),
    "mixtral": ("llama", TINY["mixtral"], {**MIXTURE, "rope.dimension_count": 16}),
    "mistral": (
        "mistral",
        {**TINY["mistral sliding"], "head_dim": 24},
        {"attention.sliding_window": 16},
    ),
    "qwen2": ("qwen2", TINY["qwen2"], {}),
    "qwen2moe": ("qwen2moe", norms.config_of("qwen2_moe"), MIXTURE),
    "qwen2moe without biases": (
        "qwen2moe",
        {**norms.config_of("qwen2_moe"), "qkv_bias": False},
        MIXTURE,
    ),
    "qwen3": ("qwen3", {**norms.config_of("qwen3"), "head_dim": 24}, {"attention.key_length": 24}),
    "qwen3moe": ("qwen3moe", norms.config_of("qwen3_moe"), MIXTURE),
    "gemma": ("gemma", norms.config_of("gemma"), {}),
    "gemma2": ("gemma2", TINY["gemma2"], {"attention.sliding_window": 16}),
    "gemma3": ("gemma3", norms.config_of("gemma3_text"), {"attention.sliding_window": 8}),
    "phi3": ("phi3", {**TINY["phi3"], "sliding_window": None}, {"rope.dimension_count": 16}),
    "gpt2": ("gpt2", TINY["gpt2"], {}),
    "starcoder2": ("starcoder2", {**BASE, "model_type": "starcoder2"}, {}),
    "starcoder2 without biases, untied": (
        "starcoder2",
        {**BASE, "model_type": "starcoder2", "use_bias": False, "tie_word_embeddings": False},
        {},
    ),
    "stablelm": ("stablelm", {**BASE, "model_type": "stablelm"}, {"rope.dimension_count": 4}),
    "stablelm parallel": (
        "stablelm",
        {**BASE, "model_type": "stablelm", "use_qkv_bias": True, "use_parallel_residual": True},
        {"rope.dimension_count": 4},
    ),
    "falcon 7b": ("falcon", {"model_type": "falcon", "num_hidden_layers": 2}, {}),
    "falcon 40b": (
        "falcon",
        {
            "model_type": "falcon",
            "num_hidden_layers": 2,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
        },
        {},
    ),
    "falcon 11b": (
        "falcon",
        {
            "model_type": "falcon",
            "num_hidden_layers": 2,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
        },
        {},
    ),
    "bloom": ("bloom", {"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 2}, {}),
    "nemotron": ("nemotron", later.tiny("nemotron"), {"rope.dimension_count": 4}),
    "nemotron biased": (
        "nemotron",
        later.tiny("nemotron", attention_bias=True, mlp_bias=True),
        {"rope.dimension_count": 4},
    ),
    "gpt-oss": (
        "gpt-oss",
        later.tiny("gpt_oss"),
        {**MIXTURE, "attention.key_length": 8, "attention.sliding_window": 8},
    ),
    "minimax-m2": (
        "minimax-m2",
        later.tiny("minimax_m2", rotary_dim=4),
        {**MIXTURE, "attention.key_length": 8, "rope.dimension_count": 4},
    ),
    "deepseek v3": (
        "deepseek2",
        LATENT,
        {
            "expert_count": 8,
            "expert_used_count": 2,
            "expert_shared_count": 1,
            "expert_feed_forward_length": 32,
            "expert_gating_func": 2,
            "expert_group_count": 2,
            "expert_group_used_count": 1,
            "leading_dense_block_count": 1,
            "attention.q_lora_rank": 24,
            "attention.kv_lora_rank": 32,
            "attention.key_length": 24,
            "attention.value_length": 16,
            "rope.dimension_count": 8,
        },
    ),
    "deepseek v2 lite": (
        "deepseek2",
        later.tiny("deepseek_v2", q_lora_rank=None, n_shared_experts=2),
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_shared_count": 2,
            "expert_feed_forward_length": 20,
            "leading_dense_block_count": 1,
            "attention.kv_lora_rank": 16,
            "attention.head_count_kv": 1,  # as written since the latent is absorbed
            "attention.key_length": 20,
            "attention.value_length": 16,
            "attention.key_length_mla": 12,
            "attention.value_length_mla": 6,
            "rope.dimension_count": 4,
        },
    ),
}
SMALL_FALCON = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
for _, config, _ in CASES.values():
    if config["model_type"] == "falcon":
        config |= SMALL_FALCON
    if config["model_type"] == "bloom":
        config |= {"vocab_size": 100}


def tensors_of(live: Any, architecture: str) -> dict[str, np.ndarray]:
    """The tensors as llama.cpp's converter writes them: names, [out, in], experts stacked."""
    word = "llama" if architecture == "mistral" else architecture
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == word)
    names = gguf.get_tensor_name_map(arch, live.config.num_hidden_layers)
    made: dict[str, np.ndarray] = {}
    conv1d = {n for n, m in live.named_modules() if type(m).__name__ == "Conv1D"}
    for name, parameter in live.named_parameters():
        value = parameter.detach().float().numpy()
        stem, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, suffix = name, "weight"
            if name.endswith("_bias"):
                stem, suffix = name.removesuffix("_bias"), "bias"
        if stem in conv1d and suffix == "weight":
            value = value.T
        if architecture == "gpt-oss" and ".experts." in name:
            value = value.swapaxes(-1, -2) if suffix == "weight" else value
        parts = {stem: value}
        if ".experts.gate_up_proj" in name:
            half = value.shape[1] // 2
            parts = {
                stem.replace("gate_up_proj", "gate_proj"): value[:, :half],
                stem.replace("gate_up_proj", "up_proj"): value[:, half:],
            }
        for part, content in parts.items():
            theirs = names.get_name(part) or names.get_name(part.removeprefix("transformer."))
            assert theirs is not None, name
            made[f"{theirs}.{suffix}"] = np.ascontiguousarray(content)
    return made


def write(
    path: Path,
    live: Any,
    architecture: str,
    metadata: dict[str, Any],
    kinds: Any = lambda name, value: Kind.F32,
    **extra: np.ndarray,
) -> Path:
    """A GGUF file of a live model, by gguf's own writer."""
    c = live.config
    writer = gguf.GGUFWriter(path, architecture)
    inner = getattr(c, "intermediate_size", None) or getattr(c, "ffn_hidden_size", None)
    inner = inner or getattr(c, "n_inner", None) or 4 * c.hidden_size
    kv = getattr(c, "num_kv_heads", None) or getattr(c, "num_key_value_heads", None)
    kv = kv or c.num_attention_heads
    if architecture == "falcon" and c.multi_query and not c.new_decoder_architecture:
        kv = 1
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(getattr(c, "max_position_embeddings", None) or 512)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(c.num_attention_heads)
    writer.add_vocab_size(c.vocab_size)
    if "attention.head_count_kv" not in metadata:
        writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(getattr(c, "rms_norm_eps", 1e-5))
    writer.add_layer_norm_eps(1e-5)
    for key, value in metadata.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_token_list([f"token {i}" for i in range(c.vocab_size)])
    writer.add_token_scores([0.0] * c.vocab_size)
    writer.add_chat_template("{{ x }}" * 4000)
    for name, value in {**tensors_of(live, architecture), **extra}.items():
        kind = kinds(name, value)
        if kind == Kind.F32:
            writer.add_tensor(name, value.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=CASES)
def case(request, tmp_path) -> tuple[Path, Any]:
    architecture, config, metadata = CASES[request.param]
    live = build(config, device="cpu", dtype=torch.float32)
    return write(tmp_path / "model.gguf", live, architecture, metadata), live


def test_a_gguf_file_is_the_model_that_it_was_made_of(case):
    path, live = case
    model, checkpoint = planner.load_model(path), planner.read_checkpoint(path)
    assert_same_parameters(model, live)
    assert checkpoint.compare(model) == ()
    assert checkpoint.kind == "gguf"
    assert checkpoint.weights_bytes == 4 * model.parameter_count
    assert (model.dtype, model.quantization, model.name) == ("fp32", None, "model")


def test_headers_are_those_that_gguf_reads(case):
    path, _ = case
    theirs = gguf.GGUFReader(path)
    assert {t.name: (t.dtype, t.shape[::-1], t.size_bytes) for t in read(path)} == {
        t.name: (t.tensor_type.name, tuple(t.shape.tolist()), t.n_bytes) for t in theirs.tensors
    }


def read(path: Path) -> tuple[Any, ...]:
    return planner.read_checkpoint(path).tensors


BY_TRANSFORMERS = ("llama", "qwen2", "qwen3moe", "gemma2", "gemma3", "gpt2", "phi3", "nemotron")


@pytest.mark.parametrize("name", BY_TRANSFORMERS)
def test_the_config_is_the_one_that_transformers_makes_of_the_file(name, tmp_path):
    architecture, config, metadata = CASES[name]
    live = build(config, device="cpu", dtype=torch.float32)
    write(tmp_path / "model.gguf", live, architecture, metadata)
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf").to_dict()
    ours = planner.load_model(tmp_path / "model.gguf").config
    assert ours.pop("model_type") == theirs["model_type"]
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    more = ("intermediate_size", "vocab_size", "tie_word_embeddings", "num_experts_per_tok")
    for field in (*same, *more, "num_experts", "sliding_window"):
        if field in ours and field in theirs:
            assert ours[field] == theirs[field], field


def test_every_architecture_has_a_case():
    assert {architecture for architecture, _, _ in CASES.values()} == set(ARCHITECTURES)


def test_a_quantised_file_has_the_bytes_of_its_blocks(tmp_path):
    config = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
    live = build(config, device="cpu", dtype=torch.float32)

    def kinds(name: str, value: np.ndarray) -> Kind:
        if value.ndim < 2:
            return Kind.F32
        if "attn_v" in name:
            return Kind.BF16
        return Kind.Q8_0 if "ffn" in name else Kind.Q4_0

    path = write(tmp_path / "q.gguf", live, "llama", {"rope.dimension_count": 64}, kinds)
    model, checkpoint = planner.load_model(path), planner.read_checkpoint(path)
    assert_same_parameters(model, live)
    assert checkpoint.compare(model) == ()
    assert (model.dtype, model.quantization.method) == ("fp16", "gguf")
    with pytest.raises(ConfigError, match="'gguf' is not planned tensor by tensor"):
        model.weight_table()
    mix = {share.dtype: share for share in checkpoint.dtype_mix()}
    assert set(mix) == {"F32", "BF16", "Q8_0", "Q4_0"}
    assert mix["Q8_0"].size_bytes * 32 == mix["Q8_0"].elements * 34
    assert mix["Q4_0"].size_bytes * 32 == mix["Q4_0"].elements * 18
    theirs = gguf.GGUFReader(path)
    assert checkpoint.weights_bytes == sum(t.n_bytes for t in theirs.tensors)
    work = planner.Inference(batch=1, prompt_tokens=8)
    held = planner.estimate(model, work, planner.Deployment(gpu="h200", runtime="llama.cpp"))
    assert held.memory.weights_bytes == sum(t.n_bytes for t in theirs.tensors)
    rows = {row.item.partition(",")[0]: row.size_bytes for row in held.rows}
    assert rows["Q4_0"] == mix["Q4_0"].size_bytes
    loaded = planner.estimate(model, work, planner.Deployment(gpu="h200"))  # dequantised
    assert loaded.memory.weights_bytes >= 2 * model.parameter_count
    with pytest.raises(ConfigError, match="'gguf' is not planned tensor by tensor"):
        planner.estimate(model, work, planner.Deployment(gpu="h200", runtime="vllm"))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16])
def test_the_dtype_is_that_of_the_matrices(kind, tmp_path):
    live = build(LLAMA, device="cpu", dtype=torch.float32)

    def kinds(name: str, value: np.ndarray) -> Kind:
        return kind if value.ndim > 1 else Kind.F32

    path = write(tmp_path / "x.gguf", live, "llama", {"rope.dimension_count": 16}, kinds)
    assert planner.load_model(path).dtype == kind.name.lower().replace("f16", "fp16").replace(
        "bfp16", "bf16"
    )


def test_what_is_missing_or_more_is_found(tmp_path):
    live = build(LLAMA, device="cpu", dtype=torch.float32)
    path = write(
        tmp_path / "x.gguf",
        live,
        "llama",
        {"rope.dimension_count": 16},
        **{
            "rope_freqs.weight": np.ones(8),
            "blk.3.nextn.eh_proj.weight": np.ones((4, 4)),
            "blk.3.ffn_up.weight": np.ones((4, 4)),
            "cls.weight": np.ones((2, 4)),
        },
    )
    found = {f.id: f for f in planner.read_checkpoint(path).compare(planner.load_model(path))}
    assert {n: f.severity for n, f in found.items()} == {
        "mtp-layers": "note",
        "buffers": "note",
        "extra-tensors": "warning",
    }
    config = planner.load_model(path).config
    other = planner.read_config({**config, "num_hidden_layers": 5, "intermediate_size": 64})
    errors = [f.id for f in planner.read_checkpoint(path).compare(other) if f.severity == "error"]
    assert set(errors) >= {"missing-tensors", "other-shapes"}


def test_an_absorbed_latent_is_the_same_matrix_in_two_parts(tmp_path):
    architecture, config, metadata = CASES["deepseek v3"]
    live = build(config, device="cpu", dtype=torch.float32)
    path = tmp_path / "x.gguf"
    names = tensors_of(live, architecture)

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"block_count": 3, "context_length": 512, "embedding_length": 64}.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_uint32(f"{architecture}.feed_forward_length", 160)
    writer.add_uint32(f"{architecture}.attention.head_count", 4)
    for key, value in metadata.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for name, value in names.items():
        if ".attn_kv_b." in name:
            k, v = np.split(value.reshape(4, 32, 32), [16], axis=1)
            writer.add_tensor(name.replace("attn_kv_b", "attn_k_b"), np.ascontiguousarray(k))
            writer.add_tensor(name.replace("attn_kv_b", "attn_v_b"), np.ascontiguousarray(v))
        else:
            writer.add_tensor(name, value)
    for i in (1, 2):
        writer.add_tensor(f"blk.{i}.exp_probs_b.bias", np.zeros(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = planner.load_model(path)
    assert_same_parameters(model, live)
    assert planner.read_checkpoint(path).compare(model) == ()


def small(path: Path, **options: Any) -> gguf.GGUFWriter:
    """A writer with the metadata of a one-layer llama, and its embedding and last norm."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    for key, value in {"block_count": 1, "context_length": 8, "embedding_length": 32}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_both_byte_orders_and_other_alignments_are_read(tmp_path, order):
    writer = small(tmp_path / "x.gguf", endianess=order)
    writer.add_custom_alignment(128)
    finish(writer)
    model = planner.load_model(tmp_path / "x.gguf")
    assert (model.vocab_size, model.hidden_size, len(model.layers)) == (3, 32, 1)
    assert planner.read_checkpoint(tmp_path / "x.gguf").weights_bytes == 4 * (3 * 32 + 32)


def test_split_files_are_joined_and_a_missing_one_is_an_error(tmp_path):
    live = build(LLAMA, device="cpu", dtype=torch.float32)
    whole = write(tmp_path / "whole.gguf", live, "llama", {"rope.dimension_count": 16})
    folder = tmp_path / "split"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=8)
    c = live.config
    for key, value in {
        "block_count": 3,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 160,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 16,
        "vocab_size": c.vocab_size,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    for name, tensor in tensors_of(live, "llama").items():
        writer.add_tensor(name, tensor)
    finish(writer)
    files = sorted(folder.iterdir())
    assert len(files) == 4
    assert_same_parameters(planner.load_model(folder), live)
    for source in (folder, files[0], files[2]):
        checkpoint = planner.read_checkpoint(source)
        assert checkpoint.weights_bytes == planner.read_checkpoint(whole).weights_bytes
        assert checkpoint.compare(planner.load_model(source)) == ()
    files[-1].unlink()
    model = planner.load_model(folder)
    found = {f.id for f in planner.read_checkpoint(folder).compare(model)}
    assert found >= {"missing-shard", "missing-tensors"}


def test_a_folder_of_one_gguf_is_a_model_and_one_of_several_asks_which(tmp_path, capsys):
    finish(small(tmp_path / "a.gguf"))
    assert planner.load_model(tmp_path).vocab_size == 3
    assert planner.read_checkpoint(tmp_path).kind == "gguf"
    with pytest.raises(SystemExit) as ended:
        main(["params", str(tmp_path), "--files", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1
    assert [f["id"] for f in answer["findings"]] == ["missing-tensors"]
    assert answer["kind"] == "gguf"
    finish(small(tmp_path / "b.gguf"))
    for ask in (planner.load_model, planner.read_checkpoint):
        with pytest.raises(ConfigError, match=r"2 GGUF files \(a\.gguf, b\.gguf\): name one"):
            ask(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("mamba", {}, "general.architecture='mamba' is not read: "),
        ("qwen2mo", {}, "is not read: qwen2moe"),
        ("clip", {}, "general.architecture='clip' is not read"),
        ("llama", {"block_count": None}, r"llama\.block_count is missing"),
        ("llama", {"embedding_length": None}, r"llama\.embedding_length is missing"),
        ("llama", {"block_count": 10**6}, "num_hidden_layers=1000000 is not allowed"),
        ("llama", {"attention.head_count": 0}, "attention.head_count=0 is not allowed"),
        ("llama", {"attention.head_count": "two"}, "head_count='two' is not allowed"),
        ("llama", {"attention.head_count_kv": [1, 2]}, r"num_key_value_heads=\(1, 2\)"),
        ("llama", {"feed_forward_length": 2.5}, "intermediate_size=2.5 is not allowed"),
        ("llama", {"rope.dimension_count": 3}, "head_dim=3 gives 3 rotary dimensions"),
        ("gemma2", {"block_count": 46, "attention.head_count": 0}, "head_count=0 is not"),
        ("gemma2", {"block_count": 46, "embedding_length": "x"}, "embedding_length='x'"),
        ("nemotron", {"attention.head_count": [2]}, r"head_count=\(2,\) is not allowed"),
        ("stablelm", {"attention.key_length": "x", "rope.dimension_count": 4}, "key_length='x'"),
        ("deepseek2", {}, r"deepseek2\.rope\.dimension_count is missing"),
    ],
)
def test_metadata_that_describes_no_model_is_one_line(tmp_path, architecture, metadata, message):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
    base = {"block_count": 1, "context_length": 8, "embedding_length": 32}
    base |= {"feed_forward_length": 64, "attention.head_count": 2}
    for key, value in {**base, **metadata}.items():
        name = f"{architecture}.{key}"
        match value:
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)
    writer.add_tensor("token_embd.weight", np.ones((3, 32), dtype=np.float32))
    finish(writer)
    with pytest.raises(ConfigError, match=message) as caught:
        planner.load_model(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


U64 = 2**64 - 1


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def head(tensors: int = 0, keys: int = 0, *, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def listing(kind: int, count: int, content: bytes = b"") -> bytes:
    return head(keys=1) + text(b"k") + struct.pack("<IIQ", 9, kind, count) + content


def info(
    name: bytes = b"t", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, n: int = -1
) -> bytes:
    count = len(dims) if n < 0 else n
    shape = struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + struct.pack("<I", count) + shape + struct.pack("<IQ", kind, offset)


def one(*infos: bytes, data: int = 32) -> bytes:
    content = head(tensors=len(infos)) + b"".join(infos)
    return content + bytes(-len(content) % 32 + data)


def aligned(value: int) -> bytes:
    return head(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, value)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with GGUF"),
    "wrong magic": (head(magic=b"GGML") + bytes(64), "does not begin with GGUF"),
    "pickle": (b"\x80\x04cos\nsystem\n" + bytes(64), "does not begin with GGUF"),
    "magic alone": (b"GGUF", "the header ends"),
    "version 1": (head(version=1) + bytes(64), "version 1 is not read"),
    "version 99": (head(version=99) + bytes(64), "version 99 is not read"),
    "version 0": (head(version=0) + bytes(64), "version 0 is not read"),
    "2^64 tensors": (head(tensors=U64) + bytes(64), "18,446,744,073,709,551,615 tensors"),
    "2^64 keys": (head(keys=U64) + bytes(64), "18,446,744,073,709,551,615 keys"),
    "more tensors than bytes": (head(tensors=10**5), "the header ends"),
    "key of 2^64 bytes": (head(keys=1) + text(b"k", U64) + bytes(64), "the header ends"),
    "key of 2^63 bytes": (head(keys=1) + text(b"k", 2**63) + bytes(64), "the header ends"),
    "value of 2^64 bytes": (
        head(keys=1) + text(b"k") + struct.pack("<I", 8) + text(b"v", U64) + bytes(64),
        "the header ends",
    ),
    "no UTF-8": (head(keys=1) + text(b"\xff\xfe") + bytes(64), "not UTF-8"),
    "control characters": (head(keys=1) + text(b"\x1b[2J") + bytes(64), "printable"),
    "type 77": (head(keys=1) + text(b"k") + struct.pack("<I", 77), "metadata type 77"),
    "2^64 strings": (listing(8, U64, bytes(64)), "strings is longer"),
    "2^61 strings": (listing(8, 2**61, bytes(64)), "strings is longer"),
    "2^64 numbers": (listing(4, U64, bytes(64)), "the header ends"),
    "2^62 numbers wrap to 0 bytes": (listing(10, 2**61, bytes(64)), "the header ends"),
    "lists of lists": (listing(9, 1, bytes(64)), "a list of type 9 is not read"),
    "a key twice": (
        head(keys=2) + (text(b"k") + struct.pack("<II", 4, 1)) * 2,
        "'k' is there twice",
    ),
    "2^32 dimensions": (one(info(n=2**32 - 1)), "4,294,967,295 dimensions"),
    "dimension of 2^63": (one(info(dims=(2**63,))), "shape="),
    "dimensions that wrap to 0": (one(info(dims=(2**62, 4))), "truncated"),
    "unknown type": (one(info(kind=999)), "ggml type 999"),
    "no whole blocks": (one(info(dims=(8,), kind=2)), "no blocks of 32"),
    "offset of 2^64": (one(info(offset=U64)), "lies at"),
    "unaligned offset": (one(info(), info(b"u", offset=4), data=64), "lies at 4"),
    "overlap": (one(info(), info(b"u", offset=0), data=64), "lies at 0"),
    "a tensor twice": (one(info(), info(offset=32), data=64), "a tensor is there twice"),
    "truncated": (one(info(), data=31), "is truncated: its header describes"),
    "alignment 0": (aligned(0), "general.alignment=0"),
    "alignment 3": (aligned(3), "general.alignment=3"),
    "name of no length": (one(info(b"")), "a tensor named ''"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_line_and_costs_no_memory(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    said = refusal(path)
    assert re.search(message, said)
    assert "\n" not in said
    assert len(said) < 500
    with pytest.raises(ConfigError):
        planner.load_model(path)


def test_a_sparse_file_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "x.gguf"
    for content in (head(keys=1) + text(b"k", 3 * 2**30), listing(8, 2**28), head(2**18, 2**15)):
        with path.open("wb") as file:
            file.write(content)
            file.truncate(4 * 2**30)
        assert refusal(path)


def test_a_large_vocabulary_is_counted_and_not_kept(tmp_path):
    path = tmp_path / "x.gguf"
    tokens = b"".join(text(b"%d" % i) for i in range(150_000))
    path.write_bytes(listing(8, 150_000, tokens))
    tracemalloc.start()
    planner.read_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


@given(data=st.data())
@examples(300)
def test_flipped_and_cut_files_raise_nothing_but_config_errors(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("flipped") / "x.gguf"
    finish(small(path))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    assert "\n" not in refusal(path)
    try:
        model = planner.load_model(path)
    except ConfigError:
        return
    for finding in planner.read_checkpoint(path).compare(model):
        assert "\n" not in finding.seen


@pytest.mark.parametrize("tensors", [3, {"Q4_0": 3}, {"Q4_0": [1]}, {"Q4_0": ["a", 2]}])
def test_odd_tensors_of_a_quantised_gguf_are_refused(tensors):
    quantised = {"quant_method": "gguf", "tensors": tensors}
    with pytest.raises(ConfigError, match=r"quantization_config\.tensors"):
        planner.read_config({**LLAMA, "quantization_config": quantised})
