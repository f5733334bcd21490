"""What a vLLM worker holds outside torch's tensors: context, NCCL, lazily loaded code, CUDA graphs.

Measured constants, from the 25 DEBUG start-up logs of vLLM 0.19.0 on H100 SXM in
llm-d-planner@d3121e059da8, accuracy/results/v0.19.0 ("logs" below), each a median over runs that
differ in model, dtype and length. What of it counts against the pool is
`MemoryProfilingResult.non_torch_increase` (utils/mem_utils.py, 0.19.1): growth since the snapshot
that v1/worker/gpu_worker.py takes after the communicators are made. The context and these are not
counted there; CUDA graphs are captured later and are not either, unless
VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS=1 (the default since 0.21).
"""

from __future__ import annotations

from planner.catalog.gpus import Gpu
from planner.layers import MoE
from planner.ledger import Row, constant_row
from planner.parallel import Share
from planner.runtimes.base import Setting

LOGS = "vLLM 0.19.0 start-up logs on H100"

GROWTH_BYTES = int(0.25 * 2**30)
"""One GPU: 0.24–0.26 GiB in 18 of 19 logs; code that CUDA loads at its first use."""

STAGE_GROWTH_BYTES = int(0.07 * 2**30)
"""A pipeline stage without tensor parallelism: 2 of 2 logs; the first collective has loaded most
of that code before the snapshot."""

TENSOR_GROWTH_BYTES = int(2.11 * 2**30)
"""Tensor parallel over NVLink: 2.07, 2.10, 2.13, 2.21 GiB (Llama 8B and 70B, 2 and 4 GPUs). NCCL
connects its channels at the first large all-reduce and makes another communicator to gather logits.
Over PCIe it does not: 0.25 GiB on 2 × RTX 4090 (vllm-project/vllm#13061: "non_torch_memory takes
0.25GiB"), 0.20 GiB on RTX 3090s (#14447)."""

STAGE_COMMUNICATOR_BYTES = int(0.95 * 2**30)
TENSOR_COMMUNICATOR_BYTES = int(1.03 * 2**30)
"""Held before the snapshot beyond a single GPU's context: 1.43 and 1.48 GiB less 0.51 (pipeline of
2 and 4), 1.53 and 1.55 less 0.51 (tensor parallel 2 and 4, buffers of the custom all-reduce too).
Of PCIe cards nothing is known, and nothing is added."""

GRAPH_BYTES, GRAPH_LAYER_BYTES = int(0.38 * 2**30), int(0.0165 * 2**30)
GRAPH_EXPERTS_BYTES = int(0.0135 * 2**30)
"""CUDA graphs of 51 sizes: what they share, each layer's, and what a layer with experts adds.
Fitted on Llama-3.1-8B with 32, 16 and 8 layers a GPU (0.91, 0.65, 0.51 GiB) and Qwen1.5-MoE (1.10);
the other logs lie within 0.3 GiB but DeepSeek-V2-Lite's (1.57 for 1.17). They are not in the pool's
budget."""
GRAPH_SIZES = 51


def over_nvlink(gpu: Gpu) -> bool:
    """Whether GPUs of this kind talk over NVLink in a server; bridges for pairs do not count."""
    name = gpu.interconnect or ""
    return name.startswith("NVLink") and "bridge" not in name


def growth_bytes(share: Share, setting: Setting, gpu: Gpu) -> int:
    """What grows outside torch while vLLM profiles: taken from the pool."""
    if setting.device == "cpu":
        return 0
    if share.tensor_parallel > 1 and over_nvlink(gpu):
        return TENSOR_GROWTH_BYTES
    if share.stages > 1 and share.tensor_parallel == 1:
        return STAGE_GROWTH_BYTES
    return GROWTH_BYTES


def graph_sizes(setting: Setting) -> int:
    """How many batch sizes are captured: 1, 2, 4, every 8th below 256, every 16th up to 512.

    VllmConfig._set_cudagraph_sizes: at most 2 · max_num_seqs and max_num_batched_tokens.
    """
    largest = min(2 * setting.max_sequences, 512, setting.max_batched_tokens)
    sizes = [size for size in (1, 2, 4) if size <= largest]
    sizes += range(8, min(largest + 1, 256), 8)
    sizes += range(256, largest + 1, 16)
    return len(set(sizes))


def graphs_bytes(share: Share, setting: Setting) -> int:
    """CUDA graphs, by layers and captured sizes; none in eager mode."""
    if setting.device == "cpu" or setting.mode == "eager":
        return 0
    layers, mixtures = _layers(share)
    whole = GRAPH_BYTES + GRAPH_LAYER_BYTES * layers + GRAPH_EXPERTS_BYTES * mixtures
    return whole * graph_sizes(setting) // GRAPH_SIZES


def _layers(share: Share) -> tuple[int, int]:
    """Blocks, and those of them that have experts."""
    kinds = share.model.layer_kinds().items()
    mixtures = sum(count for layer, count in kinds if isinstance(layer.feed_forward, MoE))
    return len(share.model.layers), mixtures


def outside_rows(share: Share, setting: Setting, gpu: Gpu) -> list[Row]:
    """Communicators, growth and graphs, what there is of each."""
    if setting.device == "cpu":
        return []
    tensor, stages = share.tensor_parallel > 1, share.stages > 1
    rows = []
    if over_nvlink(gpu):
        if tensor:
            rows.append(
                constant_row("NCCL, tensor parallel", TENSOR_COMMUNICATOR_BYTES, f"4 {LOGS}")
            )
        if stages:
            rows.append(constant_row("NCCL, pipeline", STAGE_COMMUNICATOR_BYTES, f"2 {LOGS}"))
    note = f"{LOGS}, median; taken from the pool"
    rows.append(constant_row("outside torch", growth_bytes(share, setting, gpu), note))
    graphs = graphs_bytes(share, setting)
    if graphs:
        layers, mixtures = _layers(share)
        rows.append(
            Row(
                component="overhead",
                item="CUDA graphs",
                count=1,
                formula="(shared + layers · each + mixtures · more) · sizes / 51",
                values=(
                    ("shared", GRAPH_BYTES),
                    ("layers", layers),
                    ("each", GRAPH_LAYER_BYTES),
                    ("mixtures", mixtures),
                    ("more", GRAPH_EXPERTS_BYTES),
                    ("sizes", graph_sizes(setting)),
                ),
                size_bytes=graphs,
                note=f"fitted on {LOGS}, ± 0.3 GiB; {setting.cuda_graphs} the pool's budget",
            )
        )
    return rows
