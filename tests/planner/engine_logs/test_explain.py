"""Logs beside the plan: differences, their reasons, what would help."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError, Deployment, explain_log
from planner.cli.commands import main
from planner.engine_logs.wording import PHRASES
from tests.planner.engine_logs import logs
from tests.properties import examples

AS_PLANNED = """\
vLLM API server version 0.19.0
non-default args: {'model': 'meta-llama/Llama-3.1-8B-Instruct', 'max_model_len': 8192, \
'gpu_memory_utilization': 0.95}
Memory profiling takes 5.2 seconds. Total non KV cache memory: 17.13GiB; torch peak memory \
increase: 1.89GiB; non-torch forward increase memory: 0.25GiB; weights memory: 14.99GiB.
Available KV cache memory: 58.11 GiB
GPU KV cache size: 476,016 tokens
Graph capturing finished in 12 secs, took 0.91 GiB
"""
"""Wording of 0.19's DEBUG log, figures of llm-d-planner@d3121e059da8, v0.19.0, Llama-3.1-8B."""


def by_item(explained):
    return {line.item: line for line in explained.lines}


def test_a_log_of_the_planned_version_agrees_in_every_part():
    explained = explain_log(AS_PLANNED)
    lines = by_item(explained)
    compared = [line for line in explained.lines if line.difference is not None]
    assert {line.why for line in compared} == {"agrees"}
    assert len(compared) == 6
    assert lines["KV tokens"].difference == pytest.approx(0, abs=100)
    assert explained.verdict == "The KV pool is as planned."
    assert explained.fits is True
    assert explained.estimate.gpu.name == "h100-80gb"
    assert any("taken for NVIDIA H100" in note for note in explained.notes)


def test_a_start_up_that_failed_is_told_what_would_fit():
    explained = explain_log(logs.TOO_LONG, "llama-3.1-8b", gpu="rtx-3090")
    assert explained.fits is False
    assert by_item(explained)["profile-run peak"].why == "agrees"
    changes = {remedy.change: remedy for remedy in explained.remedies}
    longest = next(int(c.split()[-1]) for c in changes if c.startswith("--max-model-len"))
    assert 23_600 <= longest <= 23_700  # the log: 23 648 tokens in its pool
    assert all(remedy.fits for remedy in explained.remedies)
    assert changes["--kv-cache-dtype fp8"].effect.startswith("47,")


def test_every_remedy_fits_when_it_is_planned():
    """Each is estimated anew, without the log's offset: one sequence of 29 000 finds room."""
    explained = explain_log(logs.TOO_LONG, "llama-3.1-8b", gpu="rtx-3090")
    fields = {
        "--kv-cache-dtype fp8": {"kv_dtype": "fp8"},
        "--quantization fp8": {"weight_dtype": "fp8"},
        "--tensor-parallel-size 2": {"tensor_parallel": 2},
    }
    asked = {r.change for r in explained.remedies}
    for change, field in fields.items():
        assert change in asked
        deploy = Deployment(gpu="rtx-3090", runtime="vllm", max_model_tokens=29_000, **field)
        work = planner.Inference(batch=1, prompt_tokens=28_999)
        assert planner.estimate(planner.load_model("llama-3.1-8b"), work, deploy).fits


def test_reasons_name_the_setting_that_would_give_the_figure():
    two = AS_PLANNED.replace("weights memory: 14.99GiB", "weights memory: 7.51GiB")
    assert (
        by_item(explain_log(two, gpu="h100-80gb"))["weights"].why
        == "as with tensor_parallel_size=2"
    )
    fewer = AS_PLANNED.replace("increase: 1.89GiB", "increase: 0.92GiB")
    why = by_item(explain_log(fewer, gpu="h100-80gb"))["profile-run peak"].why
    assert why.startswith("as with max_num_seqs=")


def test_the_pools_reason_adds_up_the_others():
    explained = explain_log(logs.TABLE, "llama-3-8b", gpu="h100-80gb")
    lines = by_item(explained)
    assert "outside torch −1.54 GiB" in lines["KV pool"].why
    parts = sum(lines[item].difference for item in ("weights", "profile-run peak", "outside torch"))
    left = lines["budget, utilisation × memory"].difference - parts
    assert lines["KV pool"].difference == pytest.approx(left, abs=0.02 * 2**30)


def test_an_out_of_memory_message_says_who_holds_what():
    explained = explain_log(logs.OUT_OF_MEMORY)
    lines = by_item(explained)
    assert lines["asked for"].why == "1.15 GiB more than is free"
    assert lines["reserved, not allocated"].why == "too little to help"
    assert explained.fits is False
    other = explain_log(logs.OLD_OUT_OF_MEMORY, "llama-2-13b", gpu="l40s")
    assert by_item(other)["allocated by torch"].ours == pytest.approx(24.3 * 2**30, rel=0.01)
    assert {r.change for r in other.remedies} == {"weights in int8", "weights in nf4"}


def test_fragments_and_neighbours_are_named():
    text = logs.OUT_OF_MEMORY.replace("185.98 MiB is reserved", "2.50 GiB is reserved")
    changes = [r.change for r in explain_log(text).remedies]
    assert changes[0] == "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    crowded = logs.OUT_OF_MEMORY.replace("22.97 GiB memory in use", "12.97 GiB memory in use")
    explained = explain_log(crowded)
    assert "end the other processes on the GPU" in {r.change for r in explained.remedies}
    assert by_item(explained)["held by others"].theirs == pytest.approx(10 * 2**30, rel=0.02)


def test_packed_weights_of_two_gpus_are_what_was_printed():
    """19.3952 GB of Qwen2.5-72B-Instruct-AWQ on each of two A40: 0.1 % are other positions."""
    explained = explain_log(logs.AWQ_72B, gpu="a40")
    weights = by_item(explained)["weights"]
    assert explained.estimate.deploy.tensor_parallel == 2
    assert weights.ours == pytest.approx(weights.theirs, rel=0.001)
    assert any("quantised by awq, as its name says" in note for note in explained.notes)


def test_a_config_that_the_log_prints_is_read():
    """…/issues/8691 prints "Model config Qwen2Config {…" of a model by its folder."""
    config = {**planner.load_model("qwen2.5-7b").config, "num_hidden_layers": 5}
    text = f"INFO Model config Qwen2Config {json.dumps(config, indent=2)}\n\nmodel='/models/mine'\n"
    explained = explain_log(text + logs.SECOND_ENGINE, gpu="h100-80gb")
    assert len(explained.estimate.model.layers) == 5
    broken = explain_log(text.replace('"model_type": "qwen2"', '"model_type": 7') + logs.TABLE)
    assert any("the config in the log is not read" in note for note in broken.notes)


def test_a_log_is_never_followed(tmp_path, monkeypatch):
    """Names in it are looked up in the catalogue and nowhere else."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "hf:org/name", str(tmp_path), "/dev/zero", "=cmd()"):
        explained = explain_log(f"non-default args: {{'model': {name!r}}}\n{logs.SECOND_ENGINE}")
        assert explained.estimate is None
        assert any("is not in the catalogue" in note for note in explained.notes)


def test_what_a_caller_gives_goes_before_the_log():
    deploy = Deployment(gpu="a100-40gb", runtime="vllm", max_model_tokens=4096)
    explained = explain_log(AS_PLANNED, planner.load_model("llama-3-8b"), deploy)
    assert explained.estimate.deploy == deploy
    assert explained.estimate.model.name == planner.load_model("llama-3-8b").name
    with pytest.raises(ConfigError, match="model='nonsense' is neither a file nor"):
        explain_log(AS_PLANNED, "nonsense")
    with pytest.raises(ConfigError, match="gpu='h2000'"):
        explain_log(AS_PLANNED, gpu="h2000")


def test_a_layout_that_does_not_run_is_a_note():
    text = AS_PLANNED.replace("'max_model_len'", "'tensor_parallel_size': 3, 'max_model_len'")
    explained = explain_log(text)
    assert explained.estimate is None
    assert any("not planned: num_attention_heads=32" in note for note in explained.notes)


def test_the_command_prints_json_and_writes_csv(tmp_path, capsys):
    log, table = tmp_path / "start.log", tmp_path / "out.csv"
    log.write_text(AS_PLANNED.replace("Available", "=1+1 Available"))
    with pytest.raises(SystemExit) as done:
        main(["explain-log", str(log), "--json", "--csv", str(table)])
    assert not done.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"] == "llama-3.1-8b"
    assert printed["lines"][0].keys() >= {"item", "printed", "planned", "difference", "why"}
    assert all(not cell.startswith(("=", "+")) for cell in table.read_text().split(","))


def test_a_log_comes_through_a_pipe_too(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(AS_PLANNED.encode() + b"\xff")))
    with pytest.raises(SystemExit) as done:
        main(["explain-log", "-"])
    assert not done.value.code
    assert "The KV pool is as planned." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing.log", "."])
def test_a_file_that_is_none_is_one_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["explain-log", name])
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is not a log: no such file" in error


LINES = [
    line for text in vars(logs).values() if isinstance(text, str) for line in text.splitlines()
]
PIECES = [words for _, phrases in PHRASES.values() for phrase in phrases for words in phrase]


@given(
    lines=st.lists(
        st.sampled_from(LINES)
        | st.builds("{}{}{}".format, st.sampled_from(PIECES), st.text(max_size=20), st.floats()),
        min_size=1,
        max_size=12,
    ),
    model=st.sampled_from([None, "llama-3.1-8b", "gemma-2-9b", "gpt2"]),
    gpu=st.sampled_from([None, "h100-80gb", "t4", "cpu"]),
)
@examples(60)
def test_lines_in_any_order_are_explained_or_refused(lines, model, gpu):
    try:
        explained = explain_log("\n".join(lines), model, gpu=gpu)
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert explained.explain()
    json.dumps(explained.to_dict(), allow_nan=False)
    assert len(explained.table()) == len(explained.lines)


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        ("'tensor_parallel_size': 99999999999", "not planned: tensor_parallel=99999999999"),
        (
            "'max_num_seqs': 9, 'max_num_batched_tokens': 2",
            "not planned: max_batched_tokens=2 is less than max_sequences=9",
        ),
        ("'block_size': 7777777777", "not planned: block_tokens=7777777777"),
    ],
)
def test_arguments_beyond_sense_are_a_note(arguments, note):
    explained = explain_log(AS_PLANNED.replace("'max_model_len': 8192", arguments))
    assert explained.estimate is None
    assert any(n.startswith(note) for n in explained.notes)


def test_a_readers_own_folder_goes_before_the_catalogue(tmp_path, monkeypatch):
    config = planner.load_model("llama-3.2-1b").config
    folder = tmp_path / "Llama-3.1-8B-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    explained = explain_log(AS_PLANNED, str(folder))
    assert explained.estimate.model.parameter_count == 1_235_814_400


def test_changes_are_put_together_where_none_alone_is_enough():
    """24 GB, 131 072 tokens of 128 KiB: fp8 keys and values, fp8 weights and the last GiB."""
    text = (
        "non-default args: {'model': 'a/Llama-3.1-8B', 'max_model_len': 131072}\nGPU 0: NVIDIA L4\n"
    )
    explained = explain_log(text + "ValueError: No available memory for the cache blocks.")
    together = [r for r in explained.remedies if r.change.count("--") > 1]
    assert len(together) == 1
    assert "--kv-cache-dtype fp8" in together[0].change
    assert "--quantization fp8" in together[0].change
    deploy = Deployment(
        gpu="l4", runtime="vllm", kv_dtype="fp8", weight_dtype="fp8", memory_utilization=0.95,
        max_sequences=16, max_batched_tokens=512, max_model_tokens=131_072,
    )  # fmt: skip
    model = planner.load_model("llama-3.1-8b")
    e = planner.estimate(model, planner.Inference(batch=1, prompt_tokens=131_071), deploy)
    assert e.fits
    assert f"{e.kv_pool_tokens:,} tokens" in together[0].effect
