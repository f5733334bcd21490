"""Every --json answer obeys its schema: other questions than those that the schemas came from."""

import json

import jsonschema
import pytest

from planner.cli.commands import main
from planner.cli.schema import schema_names, schema_text

QUESTIONS = {
    "estimate": [
        ["qwen2.5-7b", "--gpu", "a100-80gb", "--runtime", "vllm", "--pp", "2"],
        ["mixtral-8x7b", "--gpu", "h200", "--output", "9"],
        ["gpt2", "--gpu", "h100-80gb", "--runtime", "attnlab", "--dtype", "bf16", "--train"],
        ["gemma-2-9b", "--gpu", "l40s", "--runtime", "llama.cpp"],
        ["gpt2", "--gpu", "t4", "--dtype", "fp16", "--train", "--method", "lora"],
    ],
    "fit": [
        ["gpt2", "--gpu", "t4", "--runtime", "attnlab", "--traffic", "fixed"],
        ["llama-3.1-70b", "--gpu", "rtx-4090", "--runtime", "vllm"],
    ],
    "params": [["mixtral-8x7b"]],
    "sweep": [["gemma-2-9b", "--gpu", "t4", "--batch", "1,900", "--context", "99,99999"]],
    "diff": [["gpt2", "--gpu", "t4", "--change", "runtime=attnlab,dtype=fp16"]],
    "trace": [["llama-50m", "--tokens", "8", "--train", "--optimizer", "adamw"]],
    "compare": [[], ["--by", "device"], ["--by", "model", "--baselines"]],
    "check": [["gpt2"], ["llama-2-7b", "--gpu", "t4", "--batch", "9"]],
}


def test_every_schema_is_one_and_is_printed(capsys):
    assert {"estimate", "fit", "report", "explain-log", "compare"} <= set(schema_names())
    for name in schema_names():
        jsonschema.Draft202012Validator.check_schema(json.loads(schema_text(name)))
        with pytest.raises(SystemExit) as ended:
            main(["schema", name])
        assert ended.value.code == 0
        assert json.loads(capsys.readouterr().out)["title"] == f"planner {name} --json"


def test_a_command_without_a_schema_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["schema", "nonsense"])
    assert ended.value.code == 2
    assert "command='nonsense' is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "question"), [(c, q) for c, several in QUESTIONS.items() for q in several]
)
def test_answers_obey(command, question, capsys):
    with pytest.raises(SystemExit):
        main([command, *question, "--json"])
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, json.loads(schema_text(command)))


def test_a_report_and_an_explained_log_obey(tmp_path, capsys):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text("""
[[gpus]]
name = "a100-80gb"
count = 2
[[services]]
name = "one"
model = "qwen2.5-7b"
requests_per_s = 3
prompt_tokens = 500
output_tokens = 90
output_sigma = 0.5
tpot_s = 0.001
""")
    log = tmp_path / "vllm.log"
    log.write_text("Model loading took 14.99 GiB memory\nGPU KV cache size: 10,000 tokens\n")
    for asked in (["report", str(fleet)], ["explain-log", str(log), "--gpu", "h200"]):
        with pytest.raises(SystemExit):
            main([*asked, "--json"])
        answer = json.loads(capsys.readouterr().out)
        jsonschema.validate(answer, json.loads(schema_text(asked[0])))
