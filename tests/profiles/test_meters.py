"""The live-tensor meter against byte counts done by hand (float32: 4 bytes an element)."""

import pytest
import torch

from profiles.meters import LiveTensorMeter, Stopwatch, module_bytes, storage_bytes, tensor_bytes


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_a_freed_temporary_leaves_the_live_bytes_and_stays_in_the_peak():
    with LiveTensorMeter() as meter:
        a = torch.zeros(100)  # 400
        b = a + 1  # 800
        del a  # 400
        c = b[:50] * 2  # 600
        d = torch.cat([c, c])  # 1000: the peak
        del b, c  # 400
        e = d.neg()  # 800
        assert meter.live_bytes == d.nbytes + e.nbytes == 800
    assert meter.peak_bytes == 1000
    assert meter.peak_op == "cat"


def test_views_and_in_place_ops_hold_nothing_of_their_own():
    with LiveTensorMeter() as meter:
        a = torch.zeros(10, 10)
        views = [a.view(100), a.t(), a[2:4], a.unsqueeze(0).expand(7, 10, 10)]
        a.add_(1).mul_(2)
        a[0].fill_(5)
        torch.relu_(a)
    assert meter.live_bytes == meter.peak_bytes == 400
    assert len(views) == 4


def test_a_storage_lives_as_long_as_any_view_of_it():
    with LiveTensorMeter() as meter:
        first_row = torch.zeros(10, 10)[0]
        assert meter.live_bytes == 400
        del first_row
        assert meter.live_bytes == 0


def test_what_existed_before_is_not_counted_nor_are_views_and_in_place_ops_of_it():
    x, table = torch.ones(100), torch.ones(50, 10)
    with LiveTensorMeter() as meter:
        kept = [x.view(10, 10), x.detach(), x.add_(1), table.t()]
        assert meter.peak_bytes == 0
        kept.append(x.view(10, 10) @ torch.ones(10, 1))  # ones 40, product 40
        assert meter.live_bytes == 40
    assert meter.peak_bytes == 80


def test_an_inputs_release_inside_is_not_subtracted():
    x = torch.ones(100)
    with LiveTensorMeter() as meter:
        y = x + 1
        del x
        assert meter.live_bytes == y.nbytes == 400


def test_a_storage_freed_after_the_context_was_counted_once():
    with LiveTensorMeter() as meter:
        a = torch.zeros(100)
    del a
    assert (meter.peak_bytes, meter.live_bytes) == (400, 0)


def test_addresses_used_again_are_new_storages():
    with LiveTensorMeter(log=True) as meter:
        for _ in range(50):
            torch.zeros(1000)
        assert meter.live_bytes == 0
    assert meter.peak_bytes == 4000
    assert [change for _, change in meter.events] == [4000, -4000] * 50


def test_outputs_that_grow_in_place_count_at_their_new_size():
    x = torch.ones(100)
    with LiveTensorMeter() as meter:
        out = torch.empty(0)
        torch.cat([x, x], out=out)
        assert meter.live_bytes == out.nbytes == 800


def test_tensors_made_from_python_numbers_are_seen():
    with LiveTensorMeter() as meter:
        numbers = torch.tensor([1.0, 2.0, 3.0])
        assert meter.live_bytes == numbers.nbytes == 12


def test_an_op_with_two_outputs_counts_both():
    with LiveTensorMeter(log=True) as meter:
        values, indices = torch.arange(10.0).topk(3)
        assert meter.live_bytes == values.nbytes + indices.nbytes == 12 + 24
    assert meter.events == [("arange", 40), ("topk", 12), ("topk", 24), ("topk", -40)]


def test_reset_peak_starts_from_what_is_alive():
    with LiveTensorMeter() as meter:
        a = torch.zeros(100)
        torch.zeros(1000)
        meter.reset_peak()
        assert meter.peak_bytes == a.nbytes
        torch.zeros(10)
    assert meter.peak_bytes == 440


def test_storages_on_other_devices_are_left_out_when_one_is_named():
    with LiveTensorMeter(device=torch.device("cpu")) as meter:
        elsewhere, here = torch.zeros(100, device="meta"), torch.zeros(10)
        assert meter.live_bytes == here.nbytes == 40
    assert elsewhere.device.type == "meta"


def test_the_ops_that_ran_are_known():
    with LiveTensorMeter() as meter:
        torch.zeros(3).relu()
        assert meter.take_ops() == {"zeros", "relu"}
        torch.ones(3)
        assert meter.take_ops() == {"ones"}


def test_tensor_bytes_counts_elements_and_storage_bytes_counts_what_is_held():
    base = torch.zeros(10, 10)
    parts = [base[:2], base[5:6], base[5:6]]
    assert tensor_bytes(parts) == 80 + 40 + 40
    assert tensor_bytes([base, base]) == 400
    assert storage_bytes(parts) == 400


def test_module_bytes_counts_tied_parameters_once_and_buffers():
    module = torch.nn.Module()
    module.a = torch.nn.Linear(10, 10, bias=False)
    module.b = torch.nn.Linear(10, 10, bias=False)
    module.b.weight = module.a.weight
    module.register_buffer("steps", torch.zeros(5, dtype=torch.int64), persistent=False)
    assert module_bytes(module) == 400 + 40


def test_a_stopwatch_keeps_every_step_and_none_of_one_that_failed():
    readings = iter([0.0, 1.0, 5.0, 7.0, 9.0])
    watch = Stopwatch(device=torch.device("cpu"), clock=lambda: next(readings))
    for _ in range(2):
        with watch.step():
            pass
    with pytest.raises(ZeroDivisionError), watch.step():
        raise ZeroDivisionError
    assert watch.samples_s == [1.0, 2.0]
    assert len(watch.host_add_s) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_meter_and_the_allocator_agree_on_requested_bytes():
    from profiles.meters import cuda_peaks, reset_cuda_peaks

    device = torch.device("cuda")
    reset_cuda_peaks(device)
    before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    with LiveTensorMeter() as meter:
        a = torch.zeros(1000, device=device)
        b = a + 1
        del a
    assert cuda_peaks(device).requested_bytes - before == meter.peak_bytes
    assert b.nbytes == meter.live_bytes
