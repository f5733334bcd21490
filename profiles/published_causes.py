"""Why a published latency is missed: what a source, a page or our own calibration says of it.

A sentence states what was checked there, or begins with "not explained". None is read off the
error: they go by engine, quantity, what binds the plan and which way it misses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

HOST = (
    "bound by the host, an EPYC 7742 (environment.cpu), of which is not published how fast it "
    "issues ops; planned as fast as the host of the H200 whose ops were timed"
)
CAT = (
    "the cache grows by torch.cat, and torch 2.1 copies 16-bit elements one by one: wide loads "
    "came with PyTorch's pull request 150233, wide stores with 162440; planned as torch 2.11's "
    "was timed, and how much of the gap that is, was not measured"
)
OLD_KERNELS = (
    "not explained: ops beside products and attention are an H200's under torch 2.11, "
    "transferred by the ratio of bandwidths, not torch 2.1's; nor is a power cap planned, as "
    "joules of an A100 were not measured"
)
LOW_ON_ITS_PAGE = (
    "the same page has 21.32 tokens/s for Llama-2-70B, whose layers are as large, where the plan "
    "is within 5 %"
)
EXPERTS = (
    "not explained: in bf16 the same model is within 13 %; the plan unpacks a weight by three "
    "vector instructions, as those of linear layers (timing/compiled.py: UNPACKING), and nobody "
    "timed experts"
)
AROUND_THE_ENGINE = (
    "the clock runs around LLM.generate (vllm/benchmarks/throughput.py: run_vllm), so "
    "tokenising, scheduling and detokenising are in it and not planned; how much they take is "
    "not known; nor is a power cap planned, as joules of a B200 were not measured"
)
UNCALIBRATED = (
    "no op of an MI300X was timed: its plan is a roofline by stated defaults (timing/clock.py: "
    "DEFAULT), the same share of peak and bandwidth at every size"
)
UNGROUPED = (
    "kernels that make use of grouped queries (XQA) are off by default in 0.8.0, and its page "
    "does not say for which runs they were on; published lies between the plan and one with as "
    "many heads of keys as of queries"
)
FP8_ATTENTION = (
    "vLLM's attention over an fp8 cache, as timed, reaches 52 % of an H100's bandwidth (81 % in "
    "16 bits) and takes most of the planned step; TensorRT-LLM has a kernel of its own, not "
    "timed here"
)
FP8_PRODUCTS = (
    "not explained: products in fp8 of some hundred rows take most of the planned step, at 36 % "
    "of an H200's peak, as timed; TensorRT-LLM's own were not timed here"
)
NCCL = (
    "sums of all GPUs go through NCCL there (use_custom_all_reduce is off by default, and its "
    "page does not turn it on), which takes 1 to 4 ms more for 161 sums of 2 MB by our own fits; "
    "the rest is not explained"
)
OLDER = "the page of 0.8.0 has 102.8 ms for the same run, which is within 4 % of the plan"
NO_CAP = (
    "not explained: no power cap is planned, as joules of an A100 were not measured, and long "
    "products draw the most"
)
UNTIMED = "not explained: the engine's own kernels were not timed here"
PROMPT_7B = (
    "not explained: TurboMind's own kernels were not timed here; TensorRT-LLM 0.8.0 prints 16.1 "
    "and 120.5 ms for prompts of 128 and 2 048 tokens of this model on this GPU"
)
PROMPT_70B = (
    "not explained: TurboMind's own kernels were not timed here; TensorRT-LLM 0.5 prints 47 and "
    "377 ms for prompts of 128 and 2 048 tokens of this model on these GPUs"
)
UNEVEN = (
    "not explained: half of its tokens came after 37 to 55 ms, but one in a hundred took 0.25 to "
    "0.38 s (its columns 50% and 99%); what an engine waits for between passes is not planned"
)


def cause(record: dict[str, Any], quantity: str, error: float, bound_by: str) -> str:
    """A sentence for a miss, without its full stop."""
    quicker = error > 0 if quantity == "tokens_per_s" else error < 0
    return CAUSES[str(record["engine"]).split()[0]](record, quantity, quicker, bound_by)


def _transformers(record: dict[str, Any], quantity: str, quicker: bool, bound_by: str) -> str:
    if not quicker:
        return HOST
    return CAT if quantity == "tpot_s" else OLD_KERNELS


def _gpt_fast(record: dict[str, Any], quantity: str, quicker: bool, bound_by: str) -> str:
    if record["model"] == "Llama-3.1-70B" and record["gpus"] == 2:
        return LOW_ON_ITS_PAGE
    return EXPERTS if "Mixtral" in record["model"] else "not explained"


def _vllm(record: dict[str, Any], quantity: str, quicker: bool, bound_by: str) -> str:
    if record["gpu"].startswith("MI"):
        return UNCALIBRATED
    return AROUND_THE_ENGINE if quicker else "not explained"


def _tensorrt(record: dict[str, Any], quantity: str, quicker: bool, bound_by: str) -> str:
    if quantity == "ttft_s":
        if quicker and record["gpus"] > 1:
            return NCCL
        return OLDER if record["model"] == "GPT-J 6B" else UNTIMED
    if "fp8" in record["dtype"] and not quicker:
        return FP8_ATTENTION if record["model"] == "LLaMA 7B" else FP8_PRODUCTS
    if quicker and record["model"] == "Mistral 7B":
        return UNGROUPED
    return NO_CAP if quicker and record["gpu"].startswith("A100") else UNTIMED


def _lmdeploy(record: dict[str, Any], quantity: str, quicker: bool, bound_by: str) -> str:
    if quantity == "ttft_s":
        return PROMPT_7B if record["gpus"] == 1 else PROMPT_70B
    return UNEVEN if record["batch"] == 64 else UNTIMED


CAUSES: dict[str, Callable[[dict[str, Any], str, bool, str], str]] = {
    "transformers": _transformers,
    "gpt-fast": _gpt_fast,
    "torchao": _gpt_fast,
    "vLLM": _vllm,
    "TensorRT-LLM": _tensorrt,
    "LMDeploy": _lmdeploy,
}
