"""Fleets: what the file may say, and a report whose rows hold when they are tried."""

import functools
import json

import pandas as pd
import pytest

import planner
from planner import ConfigError
from planner.capacity import traffic
from planner.capacity.fleet_report import COLUMNS, best_rows, capacity_report, report_markdown
from planner.cli.commands import main

GPUS = """
[[gpus]]
name = "h100-80gb"
count = 8
price_per_hour = 2.5

[[gpus]]
name = "rtx-4090"
count = 4
price_per_hour = 0.4
"""
CHAT = """
[[services]]
name = "chat"
model = "llama-3.1-8b"
requests_per_s = 20
prompt_tokens = 1200
output_tokens = 300
prompt_sigma = 0.9
output_sigma = 0.7
ttft_s = 1.0
tpot_s = 0.05
"""
BIG = """
[[services]]
name = "=big|one"
model = "llama-3.1-70b"
requests_per_s = 2
prompt_tokens = 4000
output_tokens = 800
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "fleet.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("fleet") / "fleet.toml"
    path.write_text(GPUS + CHAT + BIG)
    return capacity_report(planner.load_fleet(path))


def test_the_columns_are_stable_and_say_their_units(table):
    assert list(table.columns) == list(COLUMNS)
    assert {n: str(t) for n, t in table.dtypes.items() if COLUMNS[n] != "object"} == {
        n: t for n, t in COLUMNS.items() if t != "object"
    }


def test_every_row_is_what_the_api_says(table):
    models = {"chat": "llama-3.1-8b", "=big|one": "llama-3.1-70b"}
    lengths = {
        "chat": traffic.lognormal(
            prompt_mean=1200, prompt_sigma=0.9, output_mean=300, output_sigma=0.7
        ),
        "=big|one": traffic.fixed(4000, 800),
    }
    for row in table.itertuples():
        deploy = planner.Deployment(
            gpu=row.gpu,
            runtime="vllm",
            tensor_parallel=int(row.tensor_parallel),
            pipeline_parallel=int(row.pipeline_parallel),
        )
        model = planner.load_model(models[row.service])
        most = planner.max_concurrent_requests(model, lengths[row.service], deploy)
        assert row.requests_at_once_per_copy == most
        assert row.fits == (most > 0)
        if row.fits:
            assert 0 < row.requests_at_once_needed <= row.copies * most
            assert row.gpus_needed == row.copies * row.gpus_per_copy
            assert row.enough == (row.gpus_needed <= row.gpus_owned)
            price = {"h100-80gb": 2.5, "rtx-4090": 0.4}[row.gpu]
            assert row.price_per_hour == pytest.approx(row.gpus_needed * price)


def test_requests_in_the_system_obey_littles_law(table):
    row = table[table["service"] == "=big|one"].iloc[1]
    lives_s = row["ttft_s"] + 799 * row["tpot_s"]
    assert row["requests_at_once_needed"] == pytest.approx(2 * lives_s, rel=0.02)


def in_the_system(rate, copies, *, seconds=50.0):
    """Requests in one of so many H100s, mean and most, of a server that takes prompts first.

    Prompts of 1 024 tokens come evenly, eight of them fill a pass; each then has 256 tokens.
    """
    model, deploy = (
        planner.load_model("llama-3.1-8b"),
        planner.Deployment(gpu="h100-80gb", runtime="vllm"),
    )

    @functools.cache
    def times(batch):
        work = planner.Inference(batch=batch, prompt_tokens=1024, output_tokens=256, logits="last")
        return planner.estimate(model, work, deploy).latency

    prompt_s = times(8).ttft_s / 8
    now, came, area, most, left = 0.0, 0, 0.0, 0, []
    while now < seconds:
        before, waiting = now, int(now * rate / copies) - came
        most = max(most, waiting + len(left))
        if waiting > 0:
            now, came = now + prompt_s, came + 1
            left.append(255)
        elif left:
            now += times(len(left)).tpot_s
            left = [tokens - 1 for tokens in left if tokens > 1]
        else:
            now = (came + 1) / (rate / copies) + 1e-9
        if now > seconds / 2:
            area += (waiting + len(left)) * (now - before)
    return area / (seconds / 2), most


@pytest.mark.parametrize("rate", [4.0, 40.0])
def test_a_server_played_step_by_step_holds_as_many_requests_on_as_many_copies(written, rate):
    path = written(
        '[[gpus]]\nname = "h100-80gb"\ncount = 1\n[[services]]\nname = "a"\n'
        f'model = "llama-3.1-8b"\nrequests_per_s = {rate}\n'
        "prompt_tokens = 1024\noutput_tokens = 256\n"
    )
    (row,) = capacity_report(planner.load_fleet(path)).itertuples()
    mean, most = in_the_system(rate, row.copies)
    assert most <= row.requests_at_once_per_copy
    assert row.requests_at_once_needed / row.copies == pytest.approx(mean, rel=0.03)
    if row.copies > 1:  # one fewer cannot keep up: the queue outgrows what the memory holds
        _, most = in_the_system(rate, row.copies - 1)
        assert most > row.requests_at_once_per_copy


def test_the_best_row_of_a_service_has_enough_gpus_and_the_lowest_price(table):
    best = best_rows(table).set_index("service")
    enough = table[table["enough"].fillna(False).astype(bool)]
    for service, row in best.iterrows():
        assert row["price_per_hour"] == enough[enough["service"] == service]["price_per_hour"].min()


def test_the_report_opens_in_excel_and_pandas_and_runs_nothing(table, written, tmp_path, capsys):
    path = written(GPUS + CHAT + BIG)
    names = [tmp_path / name for name in ("a.csv", "a.parquet", "a.md")]
    with pytest.raises(SystemExit) as ended:
        main(["report", str(path), "--json", "--csv", str(names[0]), "--parquet", str(names[1]),
              "--markdown", str(names[2])])  # fmt: skip
    answer = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert len(answer["rows"]) == len(table)
    assert {row["service"] for row in answer["best"]} == {"chat", "=big|one"}
    assert names[0].read_bytes().startswith(b"\xef\xbb\xbf")  # Excel takes it for UTF-8
    read = pd.read_csv(names[0])
    assert list(read.columns) == list(COLUMNS)
    assert "'=big|one" in set(read["service"])
    assert len(pd.read_parquet(names[1])) == len(table)
    text = names[2].read_text()
    assert "=big\\|one" in text
    assert "Together: " in text


def test_too_few_gpus_exit_with_1(written, capsys):
    path = written('[[gpus]]\nname = "t4"\ncount = 1\n' + CHAT)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(path)])
    assert ended.value.code == 1
    assert "no deployment fits" in capsys.readouterr().out


def test_a_service_may_bring_a_trace_and_a_config_of_its_own(written, tmp_path):
    (tmp_path / "trace.csv").write_text("prompt_tokens,output_tokens\n100,20\n900,300\n")
    config = planner.load_model("gpt2").config
    (tmp_path / "mine.json").write_text(json.dumps(config))
    path = written(
        GPUS
        + """
[[services]]
name = "mine"
model = "mine.json"
requests_per_s = 1
trace = "trace.csv"
runtime = "transformers"
"""
    )
    found = planner.load_fleet(path)
    assert found.services[0].traffic.in_words == "2 requests of trace.csv"
    rows = capacity_report(found)
    assert set(rows["runtime"]) == {"transformers"}
    assert rows["kv_pool_bytes"].isna().all()
    assert "mine" in report_markdown(rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpus = 1", "gpus is not there: at least one [[gpus]]"),
        ("[[gpus", "cannot be read as TOML"),
        (GPUS, "services is not there"),
        (GPUS.replace("count = 8", "count = 0") + CHAT, "gpus[0].count=0 is not allowed"),
        (GPUS.replace("h100-80gb", "h100x") + CHAT, "h100x"),
        (GPUS + CHAT.replace("requests_per_s = 20", ""), "requests_per_s is not there"),
        (GPUS + CHAT.replace("requests_per_s = 20", "requests_per_s = -1"), "a number above 0"),
        (GPUS + CHAT.replace("output_tokens = 300", ""), "output_tokens=None is not allowed"),
        (GPUS + CHAT + "speed = 1", "'speed' is not known"),
        (GPUS + CHAT + CHAT, "the name 'chat' stands there twice"),
        (GPUS + CHAT.replace("llama-3.1-8b", "no-such"), "no-such"),
        (GPUS + CHAT + 'trace = "t.csv"', "prompt_tokens is not allowed beside trace"),
        (GPUS + CHAT + 'runtime = "sglang"', "sglang"),
        (GPUS + CHAT + "kv_dtype = 8", "kv_dtype=8 is not allowed: text"),
    ],
)
def test_a_bad_fleet_is_one_line(written, text, said):
    with pytest.raises(ConfigError) as refused:
        planner.load_fleet(written(text))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as TOML: No such file"):
        planner.load_fleet(tmp_path / "none.toml")
