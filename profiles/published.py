"""Memory that others measured and published (data/published/), beside what is planned for it.

No constant of the planner was fitted on these rows. A row is planned as its notes say it was run;
where an old version held more than 5.23 does, what its source names is added in a column of its own
(`named_bytes`), never to the prediction; what a compiled one does not hold is taken off there. Rows
that nothing here can express say why.

    optimum-benchmark   transformers 4.35: forwards and generations, allocated, reserved, NVML
    litgpt              LoRA, QLoRA, LLaMA-Adapter on one GPU: max_memory_allocated
    torchtune           its recipe, a technique more in each row: peak active
    torchtitan          FSDP over 8 to 128 GPUs: max_memory_reserved
    peft                transformers with adapters: max_memory_reserved
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import planner
from planner.allocator import AllocatorSettings
from planner.allocator.settings import DEFAULTS
from planner.errors import ConfigError
from planner.estimate import kv_cache_bytes
from planner.layers import RoPE
from planner.reserved import AllocatorPlan, reserved
from profiles.published_sources import address, read, repository
from profiles.rows import relative_error

EXPLAINED_FROM = 0.05
"""A larger error than this needs a sentence."""

GPUS = {
    "A100-SXM4-80GB": "a100-80gb",
    "A100-80GB": "a100-80gb",
    "A100-SXM4-40GB": "a100-40gb",
    "NVIDIA L40S": "l40s",
    "H100-96GB HBM2e 500W": "h100-96gb-hbm2e",
    "H200-141GB": "h200",
}
QUANTITIES = {
    "allocated_bytes": "peak_allocated_bytes",
    "reserved_bytes": "peak_reserved_bytes",
    "nvml_bytes": "device_used_bytes",
}
"""The table's name → ours."""

STABLELM_ALPHA_3B = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "intermediate_size": 16384,
    "max_position_embeddings": 4096,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "vocab_size": 50688,
    "tie_word_embeddings": False,
    "hidden_act": "gelu",
}
PHI_1_5 = {
    "model_type": "phi",
    "architectures": ["PhiForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "intermediate_size": 8192,
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.5,
    "vocab_size": 51200,
    "tie_word_embeddings": False,
    "hidden_act": "gelu_new",
}
MODELS: dict[str, str | dict[str, Any]] = {
    "NousResearch/Llama-2-7b-hf": "llama-2-7b",
    "NousResearch/Llama-2-13b-hf": "llama-2-13b",
    "Llama 2 7 B": "llama-2-7b",
    "Llama 2 13 B": "llama-2-13b",
    "Llama-3.2-3B": "llama-3.2-3b",
    "Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.2-3B": "llama-3.2-3b",
    "StableLM Alpha 3 B": STABLELM_ALPHA_3B,
    "phi-1.5 1.3 B": PHI_1_5,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A published run as the planner is asked for it, and what its version named besides."""

    model: planner.Model
    work: planner.Inference | planner.Training
    deploy: planner.Deployment
    named: tuple[tuple[str, int], ...] = ()
    why: str = ""  # what else is known to differ
    settings: AllocatorSettings = DEFAULTS

    def figures(self) -> dict[str, int | None]:
        """What is predicted, by quantity; torch's allocator as the run had set it."""
        memory = planner.estimate(self.model, self.work, self.deploy).memory
        seen = {name: getattr(memory, name) for name in QUANTITIES.values()}
        torch = memory.torch
        if isinstance(torch, AllocatorPlan) and self.settings != DEFAULTS:
            played = reserved(torch, settings=self.settings).stats
            seen["peak_allocated_bytes"] = played.peak_allocated_bytes
            seen["peak_reserved_bytes"] = played.peak_reserved_bytes
        return seen


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRow:
    """One quantity of one published run; `predicted` None: not expressed, for the reason `why`.

    `named_bytes` are what the run's version held besides, less what its compiler left out, and
    `named_error` the error with them.
    """

    row: int
    source: str
    url: str
    licence: str
    model: str
    gpu: str
    run: str
    quantity: str
    measured: int
    predicted: int | None = None
    relative_error: float | None = None
    named_bytes: int = 0
    named_error: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedSummary:
    """Absolute errors of one quantity of one source; `*_named`: with what its version names."""

    source: str
    quantity: str
    n: int
    unpredicted: int
    mean_error: float | None
    worst_error: float | None
    mean_named: float | None
    worst_named: float | None


def published_summary(rows: Iterable[PublishedRow]) -> list[PublishedSummary]:
    """By source and quantity, in the order of the rows."""
    groups: dict[tuple[str, str], list[PublishedRow]] = {}
    for row in rows:
        groups.setdefault((row.source, row.quantity), []).append(row)
    return [_summarise(source, quantity, group) for (source, quantity), group in groups.items()]


def _summarise(source: str, quantity: str, group: list[PublishedRow]) -> PublishedSummary:
    plain = [abs(r.relative_error) for r in group if r.relative_error is not None]
    named = [abs(r.named_error) for r in group if r.named_error is not None]
    return PublishedSummary(
        source=source,
        quantity=quantity,
        n=len(plain),
        unpredicted=len(group) - len(plain),
        mean_error=fmean(plain) if plain else None,
        worst_error=max(plain, default=None),
        mean_named=fmean(named) if named else None,
        worst_named=max(named, default=None),
    )


def load() -> list[dict[str, Any]]:
    """The published rows as they were collected, with source and licence."""
    return read("memory.jsonl")


def published_rows() -> list[PublishedRow]:
    """Every published quantity, planned where it can be."""
    return [row for index, record in enumerate(load()) for row in rows_of(index, record)]


def rows_of(index: int, record: dict[str, Any]) -> Iterator[PublishedRow]:
    """The rows of one published run."""
    source = repository(record)
    about: dict[str, Any] = {
        "row": index,
        "source": source,
        "url": address(record),
        "licence": record["licence"],
        "model": record["model"],
        "gpu": record["gpu"] if record["gpus"] == 1 else f"{record['gpus']} × {record['gpu']}",
        "run": in_words(source, record),
    }
    quantities = {q: QUANTITIES[q] for q in QUANTITIES if q in record}
    if source == "peft":
        quantities.pop("allocated_bytes")  # a mean over the run, no peak
    try:
        plan = PLANNERS[source](record)
        figures = plan.figures()
    except ConfigError as refused:
        for theirs, ours in quantities.items():
            yield PublishedRow(**about, quantity=ours, measured=record[theirs], why=str(refused))
        return
    for theirs, ours in quantities.items():
        predicted = figures[ours]
        assert predicted is not None
        yield _row(about, plan, ours, predicted, record[theirs])


def _row(
    about: dict[str, Any], plan: Plan, quantity: str, predicted: int, measured: int
) -> PublishedRow:
    named = sum(size for _, size in plan.named)
    error = relative_error(predicted, measured)
    named_error = relative_error(predicted + named, measured)
    assert error is not None
    assert named_error is not None
    sentences = [what for what, _ in plan.named] + [plan.why]
    if quantity == "device_used_bytes":
        sentences.append(CONTEXT)
    explains = max(abs(error), abs(named_error)) > EXPLAINED_FROM
    return PublishedRow(
        **about,
        quantity=quantity,
        measured=measured,
        predicted=predicted,
        relative_error=error,
        named_bytes=named,
        named_error=named_error,
        why="; ".join(filter(None, sentences)) if explains else "",
    )


def in_words(source: str, record: dict[str, Any]) -> str:
    """What was run, in a few words."""
    s = record["settings"]
    match source:
        case "optimum-benchmark":
            new = f" + {s['new_tokens']}" if s["new_tokens"] else ""
            return f"{s['attn']}, {s['batch']} × {s['prompt']}{new}"
        case "litgpt":
            method = s["method"].removeprefix("Finetuning with ").removesuffix(" on 1 GPU")
            quant = "" if s["quant"] == "None" else f", {s['quant']}"
            return f"{method}{quant}, {s['micro_batch']} × {s['longest_sample_tokens']}"
        case "torchtune":
            return f"{s['method']}, {s['batch']} × {s['max_seq']}"
        case "torchtitan":
            compiled = ", compiled" if s["compile"] else ""
            return f"FSDP, {s['ac']}{compiled}, {s['local_batch']} × {s['seq']}"
        case _:
            return f"LoRA {s['r']}, {s['batch']} × ≤ {s['max_seq']}"


# -- how each source is planned --------------------------------------------------------------------

CONTEXT = (
    "outside torch lie 1.47 GB in every row (torch 2.1, CUDA 11.8), of which 0.65 are planned; "
    "what else was on the device is not published"
)


def _model(record: dict[str, Any]) -> planner.Model:
    return planner.load_model(MODELS[record["model"]])


def _optimum(record: dict[str, Any]) -> Plan:
    """transformers 4.35.2: a forward, or generate with a prompt whose logits are all computed."""
    s, model = record["settings"], _model(record)
    work = planner.Inference(
        batch=s["batch"],
        prompt_tokens=s["prompt"],
        output_tokens=max(1, s["new_tokens"]),
        logits="all",
        padded=True,
        float32_logits=True,
    )
    attention = "eager" if s["attn"] == "eager" else "sdpa"  # both flash kernels hold the same
    deploy = planner.Deployment(gpu=GPUS[record["gpu"]], dtype="fp16", attention=attention)
    rope, L = model.positions, len(model.layers)
    assert isinstance(rope, RoPE)
    tables = 2 * L * (model.max_position_embeddings or 0) * rope.rotary_dim * 2
    named = [("4.35 keeps sine and cosine of all positions in every layer", tables)]
    if work.output_tokens > 1:
        held = kv_cache_bytes(
            model, batch=work.batch, context_tokens=work.context_tokens - 1, dtype="fp16"
        )
        what = "its cache is a tuple: the old one of every layer is held until a step ends"
        named.append((what, held * (L - 1) // L))
    return Plan(model=model, work=work, deploy=deploy, named=tuple(named), why=_fragments(work))


def _fragments(work: planner.Inference) -> str:
    if work.output_tokens > 1:
        return "reserved: two caches that grow together leave gaps that our growth does not"
    return ""


LITGPT_METHODS = {"LoRA": "lora", "Adapter": "adapter", "Adapter v2": "adapter-v2"}
LITGPT_WEIGHTS = {"None": None, "bnb.nf4": "nf4", "bnb.nf4-dq": "nf4-double"}


def _litgpt(record: dict[str, Any]) -> Plan:
    """lit-gpt's scripts: the longest sample comes first, when no optimizer has states yet.

    finetune/lora.py, get_batch: longest_seq_ix. Adapters of rank 8 are on queries and values.
    """
    s = record["settings"]
    method = LITGPT_METHODS[s["method"].removeprefix("Finetuning with ").removesuffix(" on 1 GPU")]
    lora = planner.LoRA(rank=8, targets=("q_proj", "v_proj")) if method == "lora" else None
    work = planner.Training(
        batch=s["micro_batch"],
        sequence_tokens=s["longest_sample_tokens"],
        optimizer=None,
        method=method,  # type: ignore[arg-type]
        lora=lora,
    )
    deploy = planner.Deployment(
        gpu=GPUS[record["gpu"]],
        runtime="litgpt",
        dtype="bf16",
        weight_dtype=LITGPT_WEIGHTS[s["quant"]],
    )
    return Plan(model=_model(record), work=work, deploy=deploy)


COMPILED = "every layer is compiled: Inductor chooses what it keeps for the way back"
OFFLOADED = "inputs of layers are offloaded to the host, which is not planned"
TORCHTUNE = {
    "+compile": COMPILED,
    "+chunked CE": COMPILED,
    "+optimizer_in_bwd": "optimizer steps inside the backward are not planned",
    "+activation offload": OFFLOADED,
    "+8bit AdamW": OFFLOADED,
    "LoRA (all above, no opt_in_bwd/8bit)": OFFLOADED,
    "QLoRA": f"{OFFLOADED}, nor are torchao's NF4 tensors in training",
}
"""Why not, by the technique that a row adds: recipes/full_finetune_single_device.py at 1814feb17,
torchtune/training/_compile.py (TransformerSelfAttentionLayer and the loss of a chunk)."""
LOSS_CHUNKS = 8
"""CEWithChunkedOutputLoss: num_output_chunks."""


def _torchtune(record: dict[str, Any]) -> Plan:
    """One recipe; each row adds a technique to those before it.

    With checkpointing a compiled layer keeps its input alone, as an eager one does.
    """
    s = record["settings"]
    if s["method"] in TORCHTUNE:
        raise ConfigError(TORCHTUNE[s["method"]])
    checkpointed = s["method"] == "+activation ckpt"
    work = planner.Training(
        batch=s["batch"],
        sequence_tokens=s["max_seq"],
        optimizer_impl="fused",
        checkpointing="full" if checkpointed else "none",
        loss_chunk_tokens=s["max_seq"] // LOSS_CHUNKS if checkpointed else None,
    )
    deploy = planner.Deployment(gpu=GPUS[record["gpu"]], runtime="torchtune", dtype="bf16")
    why = "planned eager; a compiled loss keeps less of a chunk" if checkpointed else ""
    return Plan(model=_model(record), work=work, deploy=deploy, why=why)


LOSS_IN_FLOAT32 = 3 * 4
"""Bytes of a logit in the peak of an uncompiled loss: log-probabilities and two gradients."""


def _torchtitan(record: dict[str, Any]) -> Plan:
    """Its own Llama under fully_shard, planned as transformers': it has the same products in order.

    Fp32 shards, bf16 weights, reductions in fp32, all layers but the last resharded, AdamW; "op"
    keeps every second product and attention (parallelize_llama.py, train.py, optimizer.py at
    9dec370). run_llama_train.sh sets expandable segments, multinode_trainer.slurm does not. Context
    parallelism cuts sequences, and parameters are sharded over its GPUs, too.
    """
    s, gpu = record["settings"], GPUS[record["gpu"]]
    cut, selective = s.get("cp", 1), s["ac"] == "selective(op)"
    later = gpu == "h200"  # June 2025: fused AdamW, started by torchrun itself
    work = planner.Training(
        batch=s["local_batch"],
        sequence_tokens=s["seq"] // cut,
        checkpointing="selective" if selective else "full",
        keep_every=2 if selective else 1,
        optimizer_impl="fused" if later else "foreach",
    )
    deploy = planner.Deployment(
        gpu=gpu,
        dtype="bf16",
        weight_dtype="fp32",
        data_parallel_shards=s["fsdp"] * cut,
        reshard_after_forward="all-but-last",
    )
    model = _model(record)
    tokens, named = work.batch * work.sequence_tokens, []
    if s["compile"] and selective:
        unused = -2 * tokens * model.hidden_size * len(model.layers)
        named.append(
            ("compiled layers do not keep their last product, which nothing asks for", unused)
        )
    if later:
        what = "the compiled loss has no float32 logits: two tensors of bf16 are left"
        named.append((what, -tokens * model.vocab_size * (LOSS_IN_FLOAT32 - 2)))
    return Plan(
        model=model,
        work=work,
        deploy=deploy,
        named=tuple(named),
        why=_titan_why(s),
        settings=AllocatorSettings(expandable_segments=record["gpus"] == 8),
    )


def _titan_why(s: dict[str, Any]) -> str:
    """What else is known to differ of a run of torchtitan."""
    sentences = []
    if s["compile"]:
        sentences.append("compiled: planned as it runs uncompiled, an upper bound")
    if s.get("float8"):
        sentences.append("float8: products are planned in bf16")
    if s.get("cp", 1) > 1:
        sentences.append("what ring attention passes on is not planned")
    return "; ".join(sentences)


def _peft(record: dict[str, Any]) -> Plan:
    """transformers 5.13 and peft; sequences are at most `max_seq` long, batches padded."""
    s = record["settings"]
    lora = planner.LoRA(rank=s["r"], targets=tuple(s["target_modules"]))
    work = planner.Training(
        batch=s["batch"],
        sequence_tokens=s["max_seq"],
        method="lora",
        lora=lora,
        padded=True,
    )
    deploy = planner.Deployment(gpu=GPUS[record["gpu"]], dtype="bf16")
    why = "planned at the cap of 768 tokens; how long the longest batch was is not published"
    return Plan(model=_model(record), work=work, deploy=deploy, why=why)


PLANNERS: dict[str, Callable[[dict[str, Any]], Plan]] = {
    "optimum-benchmark": _optimum,
    "litgpt": _litgpt,
    "torchtune": _torchtune,
    "torchtitan": _torchtitan,
    "peft": _peft,
}
