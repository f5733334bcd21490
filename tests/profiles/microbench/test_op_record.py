"""The file of op records: small, append-only, and refused where it cannot be understood."""

import dataclasses

import pytest

from planner import ConfigError
from profiles.microbench import op_record
from profiles.microbench.op_record import DeviceState, OpRecord, Writer, environment_hash
from profiles.microbench.point import OpPoint
from tests.profiles.made import ENVIRONMENT

POINT = OpPoint(family="gemm", op="linear", shape={"m": 16, "n": 14336, "k": 4096})
RECORD = OpRecord(
    family="gemm",
    op="linear",
    shape=dict(POINT.shape),
    dtype="bf16",
    backend="default",
    cache="cold",
    repeat=0,
    split="calibration",
    status="ok",
    flops=2 * 16 * 14336 * 4096,
    bytes=118_030_336,
    environment=environment_hash(ENVIRONMENT),
    created_utc="2026-01-01T00:00:00.000+00:00",
    wall_s=0.1,
    method="graph",
    samples_s=(31.25e-6, 31.5e-6, 31.25e-6, 32e-6, 31.25e-6),
    copies=64,
    sm_clock_hz=1_980_000_000,
)
STATE = DeviceState(
    created_utc="2026-01-01T00:00:00.000+00:00", temperature_c=40, throttle_reasons=("SwPowerCap",)
)


@pytest.mark.parametrize("line", [ENVIRONMENT, RECORD, STATE])
def test_a_line_comes_back_as_it_was_written(line):
    assert op_record.from_json(op_record.to_json(line)) == line


def test_a_record_has_the_key_of_its_point():
    assert RECORD.key == POINT.key == "gemm/linear/m=16,n=14336,k=4096/bf16/default"


def test_six_hundred_records_stay_small():
    assert 600 * len(op_record.to_json(RECORD)) < 400_000


def test_an_unknown_schema_is_refused_with_its_place(tmp_path):
    path = tmp_path / "ops.jsonl"
    path.write_text(op_record.to_json(RECORD).replace('"schema":1', '"schema":99') + "\n")
    with pytest.raises(ConfigError, match=r"ops.jsonl:1: schema=99"):
        op_record.load(path)


def test_a_torn_last_line_is_reported_and_skipped(tmp_path):
    path = tmp_path / "ops.jsonl"
    with Writer(path) as writer:
        writer.write(ENVIRONMENT)
        writer.write(RECORD)
    path.write_bytes(path.read_bytes()[:-20])
    stored = op_record.load(path)
    assert not stored.ops
    assert "ops.jsonl:2: a torn last line, skipped" in stored.problems[0]
    with Writer(path) as writer:
        writer.write(RECORD)
    assert op_record.load(path).ops == (RECORD,)


def test_points_of_another_device_are_not_done(tmp_path):
    path = tmp_path / "ops.jsonl"
    with Writer(path) as writer:
        writer.write(ENVIRONMENT)
        writer.write(RECORD)
    stored = op_record.load(path)
    assert stored.done(ENVIRONMENT) == {POINT.key}
    assert stored.done(dataclasses.replace(ENVIRONMENT, device_name="NVIDIA H100")) == set()


def test_a_good_record_is_kept_over_a_later_failure():
    failed = dataclasses.replace(RECORD, status="oom", samples_s=())
    assert op_record.merged([RECORD, failed]) == {POINT.key: RECORD}
    assert op_record.merged([failed, RECORD]) == {POINT.key: RECORD}
