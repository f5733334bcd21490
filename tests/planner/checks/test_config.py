"""Configs: for every edge one that has it and one that does not; the load and its remedies."""

import json

import pytest

import planner
from planner.errors import ConfigError
from planner.layers import GQA

LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 50304}
OPT = {
    "model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16,
    "vocab_size": 50272, "word_embed_proj_dim": 1024, "num_hidden_layers": 32,
}  # fmt: skip
QWEN = {**LLAMA, "model_type": "qwen2", "rope_theta": 1e6, "max_position_embeddings": 32768}
GEMMA = {
    **LLAMA, "model_type": "gemma2", "head_dim": 128, "query_pre_attn_scalar": 128,
    "sliding_window": 4096,
}  # fmt: skip
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
SWITCH = {"model_type": "switch_transformers", "num_experts": 8, "expert_capacity": 64}


def yarn(**more):
    return {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, **more}


CASES = {
    # edge, config, load, severity, and the right config and load
    "learned positions": (
        "context-beyond-positions", GPT2, {"context_tokens": 2048}, "critical",
        GPT2, {"context_tokens": 1024},
    ),
    "rotary positions": (
        "context-beyond-positions", LLAMA, {"context_tokens": 8192}, "high",
        {**LLAMA, "max_position_embeddings": 16384, "rope_scaling": yarn()},
        {"context_tokens": 8192},
    ),
    "an original length, unscaled": (
        "context-beyond-positions",
        {**LLAMA, "max_position_embeddings": 8192, "rope_theta": 1e6,
         "rope_scaling": {"rope_type": "default", "original_max_position_embeddings": 4096}},
        {}, "high", LLAMA, {},
    ),
    "yarn for another length": (
        "rope-contradiction",
        {**LLAMA, "max_position_embeddings": 65536, "rope_scaling": yarn()}, {}, "high",
        {**LLAMA, "max_position_embeddings": 16384, "rope_scaling": yarn()}, {},
    ),
    "yarn upside down": (
        "rope-contradiction",
        {**LLAMA, "max_position_embeddings": 16384,
         "rope_scaling": yarn(beta_fast=1, beta_slow=32)}, {}, "high",
        {**LLAMA, "max_position_embeddings": 16384,
         "rope_scaling": yarn(beta_fast=32, beta_slow=1)}, {},
    ),
    "NTK that shrinks": (
        "rope-contradiction", {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 0.5}}, {},
        "high", {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {},
    ),
    "llama-3's factors": (
        "rope-contradiction",
        {**LLAMA, "max_position_embeddings": 131072, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
            "low_freq_factor": 4.0, "high_freq_factor": 1.0}}, {}, "high",
        {**LLAMA, "max_position_embeddings": 131072, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, {},
    ),
    "a small base": (
        "rope-base-too-small", {**LLAMA, "max_position_embeddings": 131072}, {}, "high",
        {**LLAMA, "max_position_embeddings": 131072, "rope_theta": 8e6}, {},
    ),
    "post-norm": (
        "post-norm-deep", {**OPT, "do_layer_norm_before": False}, {}, "high",
        {**OPT, "do_layer_norm_before": True}, {},
    ),
    "unscaled": (
        "attention-unscaled", {**GPT2, "scale_attn_weights": False}, {}, "high", GPT2, {},
    ),
    "scaled twice": (
        "attention-scaled-twice", {**GEMMA, "query_pre_attn_scalar": 128**2}, {}, "high", GEMMA, {},
    ),
    "hidden size by heads": (
        "heads-do-not-divide", {**LLAMA, "num_attention_heads": 30, "num_key_value_heads": 30}, {},
        "critical", LLAMA, {},
    ),
    "heads by kv heads": (
        "heads-do-not-divide", {**LLAMA, "num_key_value_heads": 5}, {}, "critical",
        {**LLAMA, "num_key_value_heads": 8}, {},
    ),
    "heads by GPUs": (
        "tensor-parallel-does-not-divide", LLAMA, {"tensor_parallel": 6}, "critical",
        LLAMA, {"tensor_parallel": 8},
    ),
    "kv heads by GPUs": (
        "tensor-parallel-does-not-divide",
        {**LLAMA, "num_attention_heads": 24, "head_dim": 128, "num_key_value_heads": 3},
        {"tensor_parallel": 2}, "high", LLAMA, {"tensor_parallel": 2},
    ),
    "the KV cache": (
        "kv-cache-over-gpu", LLAMA, {"gpu": "a100-80gb", "batch": 64, "context_tokens": 4096},
        "critical", LLAMA, {"gpu": "a100-80gb", "batch": 8, "context_tokens": 4096},
    ),
    "the weights": (
        "weights-over-gpu", {**LLAMA, "num_hidden_layers": 80},
        {"gpu": "t4", "context_tokens": 64}, "critical",
        LLAMA, {"gpu": "h200", "context_tokens": 64},
    ),
    "a window that is off": (
        "window-off", {**QWEN, "sliding_window": 4096, "use_sliding_window": False}, {}, "medium",
        {**QWEN, "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 0}, {},
    ),
    "a window that no layer takes": (
        "window-off",
        {**QWEN, "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 32}, {},
        "medium", {**QWEN, "sliding_window": 32768, "use_sliding_window": False}, {},
    ),
    "the vocabulary": (
        "off-tensor-core-multiple", {**LLAMA, "vocab_size": 50257}, {}, "info", LLAMA, {},
    ),
    "head_dim": (
        "off-tensor-core-multiple", {**LLAMA, "head_dim": 84}, {}, "medium",
        {**LLAMA, "head_dim": 96}, {},
    ),
    "fp16": (
        "fp16-overflow", {**GEMMA, "torch_dtype": "float16"}, {}, "medium", GEMMA, {},
    ),
    "fp16 by wide weights": (
        "fp16-overflow", {**LLAMA, "initializer_range": 0.2}, {"dtype": "fp16"}, "high",
        LLAMA, {"dtype": "fp16"},
    ),
    "every expert": (
        "moe-capacity", {**MIXTRAL, "num_experts_per_tok": 8}, {}, "medium", MIXTRAL, {},
    ),
    "a capacity factor": (
        "moe-capacity", {**MIXTRAL, "capacity_factor": 0.5}, {}, "high",
        {**MIXTRAL, "capacity_factor": 1.25}, {},
    ),
    "an expert's capacity": (
        "moe-capacity", SWITCH, {"context_tokens": 4096}, "high", SWITCH, {"context_tokens": 256},
    ),
    "tied or not": (
        "tied-mismatch",
        {"model_type": "some_vlm", "tie_word_embeddings": True,
         "text_config": {"tie_word_embeddings": False}}, {}, "medium",
        {"model_type": "some_vlm", "tie_word_embeddings": True,
         "text_config": {"tie_word_embeddings": True}}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_edge_is_found_in_the_wrong_config_and_not_in_the_right(name):
    edge, wrong, load, severity, right, other = CASES[name]
    found = [f for f in planner.check(wrong, **load) if f.id == edge]
    assert [f.severity for f in found][:1] == [severity]
    assert edge not in {f.id for f in planner.check(right, **other)}


def test_every_edge_of_configs_has_a_case():
    covered = {case[0] for case in CASES.values()} | {"not-checked"}
    known = {name for name, edge in planner.edges().items() if "config" in edge.found_in}
    assert known == covered


def test_every_edge_says_what_to_do_and_where_the_work_goes():
    places = {
        "distributed training", "model optimisation", "fine-tuning", "RLHF", "NLP", "vision",
    }  # fmt: skip
    for name, edge in planner.edges().items():
        assert edge.title, name
        assert edge.severity in ("critical", "high", "medium", "info")
        assert set(edge.found_in) <= {"config", "module", "source"}
        assert set(edge.next) <= places
        if name != "not-checked":
            assert edge.pattern
            assert edge.symptoms
            assert edge.remedy
            assert edge.next


def test_known_models_have_nothing_critical_or_high():
    """But for Bamba's config: it names 262 144 positions over a base of 10 000."""
    found = [(name, f) for name in planner.catalogue() for f in planner.check(name)]
    assert [(n, f.id) for n, f in found if f.fails] == [("bamba-9b", "rope-base-too-small")]


def test_the_first_remedy_that_fits_is_named_with_its_cost_and_those_that_do_not():
    load = {"gpu": "rtx-4090", "batch": 8, "context_tokens": 4096}
    (found,) = [f for f in planner.check(LLAMA, **load) if f.id == "kv-cache-over-gpu"]
    assert found.do.startswith("First that fits: GQA with 8 kv heads")
    assert "arXiv:2305.13245" in found.do
    heavier = {"gpu": "rtx-4090", "batch": 8, "context_tokens": 32768}
    (found,) = [f for f in planner.check(LLAMA, **heavier) if f.id == "kv-cache-over-gpu"]
    assert found.do.startswith("First that fits: tensor_parallel=8")
    assert "Not enough: GQA with 8 kv heads" in found.do


def test_a_remedys_bytes_are_those_of_an_estimate():
    from planner.checks.load import remedies, with_window
    from planner.checks.subject import Load

    model = planner.read_config(LLAMA)
    load = Load(gpu="a100-80gb", batch=4, context_tokens=16384)
    by_name = {r.change: r.room for r in remedies(model, load)}
    grouped = planner.read_config({**LLAMA, "num_key_value_heads": 8})
    expected = planner.kv_cache_bytes(grouped, batch=4, context_tokens=16384)
    assert by_name["GQA with 8 kv heads"].kv_cache_bytes == expected
    windowed = with_window(model, 4096)
    assert {
        x.attention.sliding_window for x in windowed.layers if isinstance(x.attention, GQA)
    } == {4096}


def test_a_window_that_holds_every_layer_carries_any_context():
    mistral = {**LLAMA, "model_type": "mistral", "sliding_window": 4096}
    assert (
        planner.check({**mistral, "max_position_embeddings": 32768}, context_tokens=100_000) == []
    )


def test_a_type_without_a_reader_is_checked_by_its_plain_fields():
    found = {f.id for f in planner.check({"model_type": "new", "hidden_size": 30, "n_head": 7})}
    assert {"heads-do-not-divide", "not-checked"} <= found


def test_a_file_is_named_with_the_line_of_the_field(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**GPT2, "scale_attn_weights": False}, indent=1))
    (found,) = planner.check(tmp_path)
    assert (found.id, found.file, found.line) == ("attention-unscaled", str(path), 4)


def tensors(path, names):
    header = {
        name: {"dtype": "BF16", "shape": [4, 2], "data_offsets": [16 * i, 16 * (i + 1)]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16 * len(names)))


@pytest.mark.parametrize(
    ("tied", "names", "severity"),
    [
        (False, ["model.embed_tokens.weight"], "critical"),
        (True, ["model.embed_tokens.weight", "lm_head.weight"], "medium"),
        (True, ["model.embed_tokens.weight"], None),
        (False, ["model.embed_tokens.weight", "lm_head.weight"], None),
    ],
)
def test_weight_files_say_whether_the_head_is_tied(tmp_path, tied, names, severity):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": tied}))
    tensors(tmp_path / "model.safetensors", names)
    found = [f.severity for f in planner.check(tmp_path) if f.id == "tied-mismatch"]
    assert found == ([severity] if severity else [])


@pytest.mark.parametrize(
    ("config", "load", "said"),
    [
        ({}, {}, "model_type is missing"),
        ({"model_type": ["x"]}, {}, "model_type"),
        (LLAMA, {"context_tokens": 0}, "context_tokens=0"),
        (LLAMA, {"batch": -1}, "batch=-1"),
        (LLAMA, {"gpu": "h201"}, "gpu='h201'"),
        (LLAMA, {"runtime": "x"}, "runtime='x'"),
        ({**LLAMA, "hidden_size": "many"}, {}, "hidden_size='many'"),
        ({**LLAMA, "rope_scaling": 7}, {}, "rope_parameters=7"),
        (7, {}, "target=7"),
        ("no-such-model", {}, "no-such-model"),
    ],
)
def test_bad_input_is_one_line(config, load, said):
    with pytest.raises(ConfigError, match=said) as refused:
        planner.check(config, **load)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "odd",
    [
        {"hidden_size": float("inf")}, {"num_attention_heads": float("nan")},
        {"vocab_size": 10**30}, {"rope_scaling": {"type": "yarn", "factor": "4"}},
        {"rope_scaling": {"type": ["yarn"]}}, {"sliding_window": -5}, {"text_config": []},
        {"capacity_factor": True}, {"layer_types": "x"}, {"num_hidden_layers": 10**9},
        {"rope_theta": -1},
    ],
)  # fmt: skip
def test_odd_values_are_findings_or_one_line(odd):
    said = ""
    try:
        planner.check({**LLAMA, **odd}, context_tokens=9, tensor_parallel=2, gpu="h200")
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said
