"""The store of measurements: what is written is read back, nothing is lost or invented."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import ConfigError
from profiles import records
from profiles.records import Record
from tests.profiles.made import measured

ROOT = Path(__file__).parents[2]


def record(**changes):
    """A record whose config is small enough to read."""
    small = {"config": {"model_type": "llama", "hidden_size": 64}, "attention": "sdpa"}
    return measured(**(small | changes))


seconds = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
sizes = st.integers(min_value=1, max_value=2**31)
counts = st.none() | st.integers(min_value=0, max_value=2**62)


@given(
    model=st.text(),
    status=st.sampled_from(["ok", "oom"]) | st.text().map("error: {}".format),
    phase=st.sampled_from(records.PHASES),
    split=st.none() | st.sampled_from(records.SPLITS),
    batch=sizes,
    step_s=st.lists(seconds).map(tuple),
    ttft_s=st.lists(seconds).map(tuple),
    peak_live_bytes=counts,
    energy_j=st.none() | seconds,
    throttle_reasons=st.none() | st.lists(st.text()).map(tuple),
    config=st.dictionaries(st.text(), st.none() | st.integers() | st.lists(st.text())),
)
def test_a_record_reads_back_equal_to_what_was_written(**changes):
    written = record(**changes)
    assert records.from_json(records.to_json(written)) == written


def test_a_stored_file_is_read_back_in_order(tmp_path):
    store = tmp_path / "new" / "folder" / "r.jsonl"
    written = [record(batch=b) for b in (1, 2, 3)]
    for r in written:
        records.append(store, r)
    assert records.load([store]) == (written, [])


def test_ids_differ_for_equal_content_and_config_hashes_do_not():
    one, two = record(), record(config={"hidden_size": 64, "model_type": "llama"})
    assert one.id != two.id
    assert one.config_hash == two.config_hash
    assert one.config_hash != record(config={"model_type": "llama", "hidden_size": 65}).config_hash


def test_a_record_that_stands_in_two_files_counts_once(tmp_path):
    one = record()
    for name in ("a.jsonl", "b.jsonl"):
        records.append(tmp_path / name, one)
    assert records.load([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])[0] == [one]


def test_a_torn_last_line_is_reported_and_the_rest_is_read(tmp_path):
    store = tmp_path / "r.jsonl"
    first = record()
    records.append(store, first)
    store.write_bytes(store.read_bytes() + records.to_json(record()).encode()[:100])
    read, problems = records.load([store])
    assert read == [first]
    assert len(problems) == 1
    assert problems[0].startswith(f"{store}:2: a torn last line")


def test_a_line_torn_inside_a_character_is_reported(tmp_path):
    store = tmp_path / "r.jsonl"
    line = records.to_json(record(model="modèle")).encode()
    store.write_bytes(line[: line.index("è".encode()) + 1])
    read, problems = records.load([store])
    assert read == []
    assert problems[0].startswith(f"{store}:1: ")


def test_appending_after_a_torn_line_merges_and_loses_nothing(tmp_path):
    store = tmp_path / "r.jsonl"
    torn = records.to_json(record())[:100].encode()
    store.write_bytes(torn)
    after = record()
    records.append(store, after)
    read, problems = records.load([store])
    assert read == [after]
    assert len(problems) == 1
    assert problems[0].startswith(f"{store}:1: ")
    assert store.read_bytes().startswith(torn + b"\n")


def test_a_complete_last_line_that_only_lacks_its_newline_is_read(tmp_path):
    store = tmp_path / "r.jsonl"
    first, second = record(), record()
    store.write_text(records.to_json(first))
    records.append(store, second)
    assert records.load([store]) == ([first, second], [])


def test_a_broken_line_in_the_middle_is_reported_with_file_and_line(tmp_path):
    store = tmp_path / "r.jsonl"
    first, last = record(), record()
    store.write_text(f"{records.to_json(first)}\nnot json\n{records.to_json(last)}\n")
    read, problems = records.load([store])
    assert read == [first, last]
    assert len(problems) == 1
    assert problems[0].startswith(f"{store}:2: not a JSON record")


def test_a_missing_file_is_reported(tmp_path):
    assert records.load([tmp_path / "absent.jsonl"])[1] == [
        f"{tmp_path / 'absent.jsonl'}: No such file or directory"
    ]


def test_an_unknown_schema_is_refused(tmp_path):
    store = tmp_path / "r.jsonl"
    records.append(store, record())
    store.write_text(store.read_text().replace('"schema": 3', '"schema": 4'))
    with pytest.raises(ConfigError, match=r"r\.jsonl:1: schema=4 is not known: .* reads 1, 2, 3"):
        records.load([store])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("batch"), "field batch is missing"),
        (lambda c: c.pop("schema"), "field schema is missing"),
        (lambda c: c["environment"].pop("torch"), "field environment.torch is missing"),
        (lambda c: c.update(tensor_parallel=2), "unknown field tensor_parallel"),
        (lambda c: c.update(batch="2"), "batch='2' is not allowed: expected int"),
        (lambda c: c.update(batch=True), "batch=True"),
        (lambda c: c.update(batch=0), "batch=0"),
        (lambda c: c.update(weights_bytes=-1), "weights_bytes=-1"),
        (lambda c: c.update(step_s=[0.1, None]), "step_s=None"),
        (lambda c: c.update(step_s=[float("nan")]), "NaN"),
        (lambda c: c.update(phase="warm-up"), "phase='warm-up'"),
        (lambda c: c.update(split="test"), "split='test'"),
        (lambda c: c.update(status="failed"), "status='failed'"),
        (lambda c: c.update(environment=None), "environment=None"),
    ],
)
def test_a_line_with_a_wrong_field_is_reported_by_that_field(tmp_path, change, said):
    content = dataclasses.asdict(record())
    change(content)
    store = tmp_path / "r.jsonl"
    store.write_text(json.dumps(content) + "\n")
    read, problems = records.load([store])
    assert read == []
    assert len(problems) == 1
    assert said in problems[0]


def test_unknown_numbers_are_null_in_the_file_not_zero():
    content = json.loads(records.to_json(record()))
    assert content["peak_reserved_bytes"] is None
    assert content["environment"]["driver"] is None


def test_kill_9_in_the_middle_of_appending_leaves_a_loadable_store(tmp_path):
    """Every id that the writer printed had been synced: all of them must be read back."""
    store = tmp_path / "r.jsonl"
    loop = (
        "import sys; sys.path[:0] = sys.argv[2:]; import test_records, profiles.records as r\n"
        "while True:\n"
        "    one = test_records.record(); r.append(sys.argv[1], one); print(one.id, flush=True)"
    )
    folders = [str(ROOT), str(Path(__file__).parent)]
    command = [sys.executable, "-c", loop, str(store), *folders]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        first = [writer.stdout.readline().strip() for _ in range(20)]
        os.kill(writer.pid, signal.SIGKILL)
        promised = first + writer.stdout.read().split()
    read, problems = records.load([store])
    assert {i for i in promised if len(i) == 12} <= {r.id for r in read}
    assert len(problems) <= 1
    records.append(store, record())
    assert len(records.load([store])[0]) == len(read) + 1


def timed_alone(**values):
    """Two repeats of a prompt and four steps, the host read before each; none for memory before."""
    steps = (*(1.0, 1.0, 9.0, 9.0), *(2.0, 2.0, 2.0, 4.0))
    adds = (*(0.1, 0.2), *(0.3, 0.3, 0.5, 0.7), *(0.4, 0.4, 0.4, 0.6))
    generation = {"phase": "generation", "output_tokens": 5, "ttft_s": (5.0, 6.0)}
    return record(**generation | {"step_s": steps, "host_add_s": adds} | values)


def test_a_repeat_that_met_its_lengths_for_the_first_time_is_told_apart():
    alone = timed_alone()
    assert alone.repeat_tpot_s == (2.5,)
    assert alone.new_tpot_s == 9.0  # without the two steps of the warm-up
    seen = timed_alone(peak_live_bytes=1)  # a pass for memory was there before
    assert seen.repeat_tpot_s == (5.0, 2.5)
    assert seen.new_tpot_s is None


def test_each_step_has_the_speed_that_its_host_had():
    alone = timed_alone()
    assert alone.samples("tpot_s") == ((2.0, 0.4), (2.0, 0.4), (2.0, 0.4), (4.0, 0.6))
    quantities = ("ttft_s", "tpot_s", "new_tpot_s")
    assert [alone.host_add_beside_s(q) for q in quantities] == pytest.approx([0.15, 0.45, 0.6])


def test_a_host_read_around_all_passes_is_the_same_for_each():
    around = timed_alone(host_add_s=(0.1, 0.2, 0.3))
    assert {add_s for _, add_s in around.samples("tpot_s")} == {0.2}
    assert around.new_tpot_s is None
    assert timed_alone(host_add_s=()).host_add_beside_s("tpot_s") is None


def test_statistics_are_derived_from_the_raw_samples():
    generation = record(output_tokens=3, ttft_s=(0.5, 0.7, 0.6), step_s=(1, 3, 2, 2, 4, 6))
    assert generation.median_ttft_s == 0.6
    assert generation.median_tpot_s == 2  # means of the three repeats: 2, 2, 5
    assert generation.median_step_s == 2.5
    assert record(phase="prefill", output_tokens=1, step_s=(0.1, 0.3, 0.2)).median_ttft_s == 0.2


def test_nothing_timed_has_no_statistics():
    empty = record()
    assert (empty.median_step_s, empty.median_ttft_s, empty.median_tpot_s) == (None, None, None)


def test_records_are_found_beside_the_package_and_under_the_current_directory(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    records.append(records.DEFAULT_OUT, record())
    assert records.default_paths()[-1:] == [Path("measurements/records.jsonl")]
    assert all(p.parent == ROOT / "profiles" / "data" for p in records.default_paths()[:-1])


def test_committed_records_are_all_readable():
    assert records.load(sorted(records.DATA.glob("*.jsonl")))[1] == []


def test_reading_and_comparing_records_does_not_load_torch():
    code = (
        "import sys, profiles.records, profiles.compare, profiles.nvml\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'streamlit'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"


def test_record_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().batch = 3
    assert isinstance(record(), Record)


def test_the_line_is_synced_to_disk_before_append_returns(tmp_path, monkeypatch):
    store, at_sync = tmp_path / "r.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: at_sync.append(store.read_text()))
    written = record()
    records.append(store, written)
    assert at_sync == [records.to_json(written) + "\n"]
