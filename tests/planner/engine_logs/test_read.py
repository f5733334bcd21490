"""Wordings of several versions, read out of published lines."""

import pytest

from planner import ConfigError
from planner.engine_logs import read_log
from planner.engine_logs.arguments import read_arguments
from planner.engine_logs.models import in_catalogue, quantisation
from tests.planner.engine_logs import logs

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        (
            logs.TABLE,
            {
                "gpu_memory": 79.22 * GIB, "utilization": 0.9, "budget": 71.29 * GIB,
                "weights": 14.96 * GIB, "outside": 1.79 * GIB, "activations": 1.26 * GIB,
                "kv_pool": 53.29 * GIB,
            },
        ),
        (
            logs.TOO_LONG,
            {
                "weights": 14.9888 * GIB, "gpu_memory": 23.58 * GIB, "peak_torch": 17.98 * GIB,
                "outside": 0.35 * GIB, "kv_pool": 2.89 * GIB, "utilization": 0.9,
                "kv_blocks": 1478, "concurrency": 0.82, "concurrency_tokens": 29_000,
                "kv_tokens": 23_648,
            },
        ),
        (
            logs.ONE_LINE,
            {
                "gpu_memory": 79.19 * GIB, "utilization": 0.8, "budget": 63.35 * GIB,
                "weights": 1.12 * GIB, "outside": 0.16 * GIB, "activations": 0.23 * GIB,
                "kv_pool": 61.84 * GIB, "kv_blocks": 36_184, "concurrency": 70.67,
                "concurrency_tokens": 8192, "graphs": 0.13 * GIB,
            },
        ),
        (logs.FOUR_WORKERS, {"weights": 14.2474 * GIB}),
        (
            logs.ACTUAL_USAGE,
            {
                "gpu_memory": 79.19 * GIB, "weights": 14.99 * GIB, "activations": 1.89 * GIB,
                "outside": 0.25 * GIB, "graphs": 0.91 * GIB, "kv_pool": 58.11 * GIB,
            },
        ),
        (
            logs.SECOND_ENGINE,
            {
                "kv_pool": 2.3 * GIB, "kv_tokens": 75_840, "concurrency": 2.48,
                "concurrency_tokens": 120_000,
            },
        ),
        (
            logs.NEEDED,
            {
                "needed": 24 * GIB, "kv_pool": 3.18 * GIB, "longest_tokens": 34_736,
                "concurrency_tokens": 262_144,
            },
        ),
        (
            logs.OUT_OF_MEMORY,
            {
                "tried": 1.74 * GIB, "capacity": 23.57 * GIB, "free": 605.88 * 2**20,
                "process": 22.97 * GIB, "allocated": 20.21 * GIB, "private": 128 * 2**20,
                "unallocated": 185.98 * 2**20,
            },
        ),
        (
            logs.OLD_OUT_OF_MEMORY,
            {
                "tried": 1.63 * GIB, "capacity": 44.56 * GIB, "allocated": 27.91 * GIB,
                "free": 565.31 * 2**20, "reserved": 27.93 * GIB,
            },
        ),
    ],
    ids=["table", "0.6", "one line", "four workers", "usage", "V1", "needed", "oom", "old oom"],
)  # fmt: skip
def test_every_figure_of_a_log_is_read(text, figures):
    found = read_log(text).figures
    assert {name: figure.value for name, figure in found.items()} == pytest.approx(figures)


@pytest.mark.parametrize(
    ("text", "failure", "words"),
    [
        (logs.TOO_LONG, "too long", "The model's max seq len (29000) is larger"),
        (logs.NEEDED, "too long", "To serve at least one request"),
        (logs.OUT_OF_MEMORY, "out of memory", "CUDA out of memory. Tried to allocate 1.74 GiB"),
        ("ValueError: No available memory for the cache blocks. Try", "no blocks", "No available"),
        (logs.TABLE, None, ""),
    ],
)
def test_how_a_start_up_ended_is_told(text, failure, words):
    log = read_log(text)
    assert log.failure == failure
    assert log.failure_line.startswith(words)


def test_arguments_are_those_of_the_engine():
    a = read_arguments(logs.ARGUMENTS)
    assert (a.model, a.dtype) == ("Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", "bfloat16")
    assert (a.max_model_len, a.tensor_parallel_size, a.pipeline_parallel_size) == (100_000, 2, 1)
    assert (a.quantization, a.kv_cache_dtype, a.enforce_eager) == ("fp8", "fp8_e4m3", False)
    assert read_log(logs.ARGUMENTS + logs.SECOND_ENGINE).version == "0.11.0"


def test_arguments_are_taken_from_a_command_too():
    a = read_arguments(
        "$ vllm serve meta-llama/Llama-3.1-8B-Instruct --max-model-len 32k \\\n"
        "    -tp 4 --gpu-memory-utilization=0.95 --enforce-eager --kv-cache-dtype fp8 --port 80\n"
    )
    assert a.model == "meta-llama/Llama-3.1-8B-Instruct"
    assert (a.max_model_len, a.tensor_parallel_size) == (32_000, 4)
    assert (a.gpu_memory_utilization, a.enforce_eager, a.kv_cache_dtype) == (0.95, True, "fp8")


def test_gpus_are_known_from_what_was_collected():
    smi = "|   0  NVIDIA A40                     On  |   00000000:CE:00.0 Off |"
    collected = "GPU models and configuration: GPU 0: NVIDIA H100 80GB HBM3\nGPU 1: Tesla T4\n"
    assert read_arguments(smi).gpu_names == ("NVIDIA A40",)
    assert read_arguments(collected).gpu_names == ("NVIDIA H100 80GB HBM3", "Tesla T4")


def test_workers_are_counted_where_nothing_says_how_many():
    assert read_arguments(logs.FOUR_WORKERS).tensor_parallel_size == 4
    assert read_arguments(logs.TABLE).tensor_parallel_size is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("/models/models--meta-llama--Meta-Llama-3.1-8B-Instruct/snapshots/0e9e", "llama-3.1-8b"),
        ("neuralmagic/Meta-Llama-3.1-70B-Instruct-quantized.w8a8", "llama-3.1-70b"),
        ("RedHatAI/Llama-3.3-70B-Instruct-fp8-dynamic", "llama-3.1-70b"),
        ("Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4", "qwen2.5-72b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", "qwen3-30b-a3b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "qwen2.5-14b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("../../etc/passwd", None),
        ("", None),
    ],
)
def test_names_of_repositories_and_folders_are_known(name, expected):
    assert in_catalogue(name) == expected


@pytest.mark.parametrize(
    ("name", "given", "method"),
    [
        ("a/b-AWQ", None, "awq"),
        ("a/b-GPTQ-Int8", "gptq_marlin", "gptq"),
        ("a/b-quantized.w8a8", "compressed-tensors", "compressed-tensors"),
        ("Qwen/Qwen3-8B-FP8", "fp8", "fp8"),
        ("a/b-FP8-dynamic", "compressed-tensors", "compressed-tensors"),
        ("a/b", "fp8", None),
    ],
)
def test_a_name_tells_how_its_weights_are_quantised(name, given, method):
    found = quantisation(name, given)
    assert (found and found["quant_method"]) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the log is empty"),
        (" \n\t ", "the log is empty"),
        ("\0\x01\x02 model weights take 1GiB", "not text: it has null bytes"),
        ("a poem about memory", "nothing of a vLLM start-up"),
        ("vllm gpu_memory_utilization=0.9", "nothing of a vLLM start-up"),
        (7, "the log is not text"),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_log(text)
    assert "\n" not in str(caught.value)


def test_hostile_text_ends():
    """Long lines, endless repetitions, numbers beyond sense: read or refused at once."""
    for text in (
        "x" * 3_000_000 + " model weights take 1.5GiB",
        "Tried to allocate 1 GiB. " * 20_000,
        "model weights take " + "9" * 5_000 + "GiB; GPU KV cache size: 5 tokens",
        "non-default args: {" * 5_000 + "Available KV cache memory: 1 GiB",
        "non-default args: " + "[" * 9_000 + "\nAvailable KV cache memory: 1 GiB",
        "\x1b[32mINFO\x1b[0m model weights take \x1b[1m1.5GiB\x1b[0m",
    ):
        assert read_log(text).figures
