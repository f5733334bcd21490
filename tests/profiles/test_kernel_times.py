from dataclasses import replace

import pytest
import torch

from planner import Training
from profiles.kernel_times import calls_of, kernels_of, main, passes
from profiles.points import Point, SuitePoint, TrainingPoint


def kernel(name, dur, launched=None, cat="kernel"):
    return {"cat": cat, "name": name, "dur": dur, "args": {"External id": launched}}


def test_kernels_are_counted_by_the_op_that_launched_them_and_its_shapes():
    mm = {"cat": "cpu_op", "name": "aten::mm", "dur": 9}
    events = [
        mm | {"args": {"External id": 1, "Input Dims": [[4, 8], [8, 2], []]}},
        mm | {"args": {"External id": 2, "Input Dims": [[4, 8], [8, 2], []]}},
        kernel("gemm", 3.0, 1),
        kernel("gemm", 5.0, 2),
        kernel("Memset", 1.0, 2, cat="gpu_memset"),
        kernel("replayed", 2.0),
        {"name": "no kernel", "dur": 100},
    ]
    rows = [
        (r.op, r.shapes, r.kernel, r.count, r.seconds) for r in kernels_of(events, kind="kernel")
    ]
    assert rows == [
        ("aten::mm", "4×8 8×2", "gemm", 2, pytest.approx(8e-6)),
        ("", "", "replayed", 1, pytest.approx(2e-6)),
        ("aten::mm", "4×8 8×2", "Memset", 1, pytest.approx(1e-6)),
    ]


def test_a_call_holds_those_it_makes_and_what_lies_between_calls_is_pythons():
    at = [("aten::linear", 0, 10), ("aten::mm", 2, 5), ("aten::add", 20, 4), ("aten::add", 30, 6)]
    events = [{"cat": "cpu_op", "name": n, "tid": 1, "ts": t, "dur": d} for n, t, d in at]
    rows, host_s = calls_of(events)
    assert [(r.op, r.count) for r in rows] == [("aten::linear", 1), ("aten::add", 2)]
    assert [r.seconds for r in rows] == pytest.approx([10e-6, 10e-6])
    assert host_s == pytest.approx(36e-6)


@pytest.mark.parametrize("name", ["nothing:x", "smoke:x"])
def test_a_point_that_is_in_no_suite_is_one_line(name, capsys):
    assert main([name, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def ops_of(point, phase):
    return {row.op for row in passes(point, torch.device("cpu"))[phase].kernels}


def test_a_point_is_traced_over_the_cache_that_it_asks_for():
    run = Point(phase="generation", batch=2, prompt_tokens=9, output_tokens=2)
    plain = SuitePoint(model="llama-50m", run=run, split="held-out", runtime="attnlab")
    assert "aten::round_" in ops_of(replace(plain, kv_dtype="int8"), "decode")
    assert "aten::round_" not in ops_of(plain, "decode")


def test_padding_is_hidden_in_what_is_traced():
    run = Point(phase="generation", batch=2, prompt_tokens=9, output_tokens=2)
    plain = SuitePoint(model="llama-50m", run=run, split="held-out")
    padded = replace(plain, run=replace(run, padded=True))
    assert ops_of(padded, "decode") - ops_of(plain, "decode")


def test_a_training_step_is_traced_in_what_it_computes_in():
    work = Training(batch=1, sequence_tokens=8, precision="autocast", optimizer="sgd")
    point = SuitePoint(
        model="llama-50m", run=TrainingPoint(work=work), split="held-out", dtype="fp16"
    )
    assert "aten::_amp_foreach_non_finite_check_and_unscale_" in ops_of(point, "training")
