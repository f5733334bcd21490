import pytest

from profiles.kernel_times import main, read


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
    rows = [(r.op, r.shapes, r.kernel, r.count, r.seconds) for r in read(events, kind="kernel")]
    assert rows == [
        ("aten::mm", "4×8 8×2", "gemm", 2, pytest.approx(8e-6)),
        ("", "", "replayed", 1, pytest.approx(2e-6)),
        ("aten::mm", "4×8 8×2", "Memset", 1, pytest.approx(1e-6)),
    ]


@pytest.mark.parametrize("name", ["nothing:x", "smoke:x"])
def test_a_point_that_is_in_no_suite_is_one_line(name, capsys):
    assert main([name, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
