"""Writes planner/catalog/schemas/: what `planner … --json` prints, from answers to many questions.

Run `python -m tools.json_schemas` after an answer has got another field. Every field that is always
there is required; one that may be null says so; tests hold the schemas against other answers.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from planner.cli.commands import main

OUT = Path(__file__).parents[1] / "planner" / "catalog" / "schemas"
DYNAMIC = ("values", "peers_s", "measured_s")
"""Objects whose keys are data: symbols of a formula, names of tools and runtimes."""

FLEET = """
[[gpus]]
name = "h100-80gb"
count = 8
price_per_hour = 2.5
[[gpus]]
name = "t4"
count = 1
[[gpus]]
name = "h200"
count = 1
[[services]]
name = "chat"
model = "llama-3.1-8b"
requests_per_s = 2
prompt_tokens = 1000
output_tokens = 100
ttft_s = 1
[[services]]
name = "odd"
model = "gpt2"
requests_per_s = 1
prompt_tokens = 2000
output_tokens = 100
[[services]]
name = "plain"
model = "gpt2"
requests_per_s = 0.5
prompt_tokens = 100
output_tokens = 1
runtime = "attnlab"
[[services]]
name = "large"
model = "llama-3.1-405b"
requests_per_s = 1
prompt_tokens = 100
output_tokens = 10
"""
LOG = """
INFO 04-01 10:00:00 [core.py:97] Initializing a V1 LLM engine (v0.19.0) with config: \
model='meta-llama/Llama-3.1-8B-Instruct', tensor_parallel_size=1, max_seq_len=131072
Model loading took 14.99 GiB memory and 3.2 seconds
Available KV cache memory: 54.15 GiB
GPU KV cache size: 443,568 tokens
Maximum concurrency for 131,072 tokens per request: 3.38x
"""

ADAPTED = ["gpt2", "--gpu", "cpu", "--train", "--method", "lora"]
SMALL = ["llama-3.1-8b", "--gpu", "rtx-4090"]
QUESTIONS: dict[str, list[list[str]]] = {
    "estimate": [
        SMALL,
        [*SMALL, "--runtime", "vllm", "--tp", "2", "--output", "64", "--max-model-len", "4096"],
        [*SMALL, "--kv-dtype", "int4", "--cache", "quantised:backend=hqq"],
        ["gpt2", "--gpu", "cpu", "--runtime", "attnlab", "--train", "--sequence", "64"],
        ["llama-3.1-8b", "--gpu", "h200", "--runtime", "attnlab", "--train"],
        ["llama-3.1-8b", "--gpu", "h200", "--train", "--method", "lora", "--sequence", "64"],
        ["gpt2", "--gpu", "h200", "--train", "--shards", "8", "--weight-dtype", "fp32"],
        ["gpt2", "--gpu", "cpu", "--train", "--frozen", "embeddings", "--frozen-layers", "2"],
        [*ADAPTED, "--lora-targets", "c_attn"],
        [*ADAPTED, "--lora-dtype", "bf16"],
        ["config.json", "--gpu", "cpu", "--encoder-tokens", "9"],
        ["llama-3.1-70b", "--gpu", "t4", "--runtime", "vllm", "--dtype", "fp16"],
        ["llama-3.1-8b", "--gpu", "h200", "--output", "9", "--logits", "last"],
        ["llama-3.1-8b", "--gpu", "h200", "--runtime", "llama.cpp"],
        ["mixtral-8x7b", "--gpu", "h200", "--runtime", "vllm", "--output", "9"],
        ["mixtral-8x7b", "--gpu", "h200", "--train", "--routing", "zipf:1"],
    ],
    "fit": [
        SMALL,
        [*SMALL, "--runtime", "vllm", "--traffic", "lognormal:0.5", "--output", "50"],
        ["llama-3.1-70b", "--gpu", "t4", "--dtype", "fp16"],
    ],
    "params": [["gpt2"], ["deepseek-v3"]],
    "sweep": [
        ["gpt2", "--gpu", "h200", "--context", "64,4096", "--latency"],
        ["gpt2", "--gpu", "h200", "--runtime", "attnlab", "--output", "9", "--context", "64"],
    ],
    "diff": [[*SMALL, "--change", "gpu=h200"]],
    "report": [["FLEET"], ["UNPRICED"]],
    "compare": [[], ["--by", "suite", "--baselines"]],
    "trace": [["gpt2", "--tokens", "16"]],
    "explain-log": [
        ["LOG", "--model", "llama-3.1-8b", "--gpu", "h100-80gb"],
        ["OOM"],
        ["LOADED", "--gpu", "h200"],
    ],
}
OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
    "capacity of 79.19 GiB of which 1.00 GiB is free. Process 1 has 78.00 GiB memory in use. Of "
    "the allocated memory 76.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch "
    "but unallocated."
)


def answers(command: str, questions: list[list[str]]) -> list[Any]:
    """What the command prints for each."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        unpriced = FLEET.replace("price_per_hour = 2.5", "")
        files = {"FLEET": FLEET, "UNPRICED": unpriced, "LOG": LOG, "OOM": OOM}
        files["config.json"] = '{"model_type": "t5"}'
        files["LOADED"] = "Model loading took 14.99 GiB memory"
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        for question in questions:
            asked = [str(Path(folder) / a) if a in files else a for a in question]
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                main([command, *asked, "--json"])
            found.append(json.loads(out.getvalue()))
    return found


def schema_of(samples: list[Any], *, dynamic: bool = False) -> dict[str, Any]:
    """A schema that all samples obey."""
    kinds = sorted({kind_of(sample) for sample in samples})
    if "number" in kinds and "integer" in kinds:
        kinds.remove("integer")
    made: dict[str, Any] = {"type": kinds[0] if len(kinds) == 1 else kinds}
    objects = [sample for sample in samples if isinstance(sample, dict)]
    if objects:
        values: dict[str, list[Any]] = {}
        for sample in objects:
            for key, value in sample.items():
                values.setdefault(key, []).append(value)
        if dynamic:
            flat = [value for several in values.values() for value in several]
            made["additionalProperties"] = schema_of(flat) if flat else True
        else:
            made["properties"] = {
                key: schema_of(several, dynamic=key in DYNAMIC) for key, several in values.items()
            }
            made["required"] = sorted(key for key, v in values.items() if len(v) == len(objects))
    items = [item for sample in samples if isinstance(sample, list) for item in sample]
    if items:
        made["items"] = schema_of(items)
    return made


def kind_of(value: Any) -> str:
    """The JSON type."""
    kinds = {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string"}
    return kinds.get(type(value), "object" if isinstance(value, dict) else "array")


def write() -> None:
    """All schemas."""
    OUT.mkdir(exist_ok=True)
    for command, questions in QUESTIONS.items():
        schema = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": f"planner {command} --json",
            **schema_of(answers(command, questions)),
        }
        (OUT / f"{command}.json").write_text(json.dumps(schema, indent=1) + "\n")


if __name__ == "__main__":
    write()
