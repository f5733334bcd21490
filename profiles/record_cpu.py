"""Which CPU a record is of, and whether its ops were ever timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from planner.catalog.gpus import gpu_named
from planner.catalog.here import Processor, as_on
from planner.timing.calibration import calibration_of
from profiles.records import Record

COMMAND = "planner calibrate --gpu cpu --budget 1m"


def processor_of(record: Record) -> Processor | None:
    """The CPU that a record was measured on; None of a GPU's record."""
    environment = record.environment
    if environment.gpu != "cpu":
        return None
    name = environment.cpu or environment.device_name
    return Processor(name=name, threads=environment.cpu_threads or 1)


def untimed(records: Iterable[Record]) -> str | None:
    """In a line: which CPUs' records are set against another CPU's ops; None where none is."""
    good = (processor_of(record) for record in records if record.status == "ok")
    counts = Counter(processor for processor in good if processor is not None)
    found, timed = Counter[Processor](), "no CPU"
    for processor, count in counts.items():
        with as_on(processor):
            known = calibration_of(gpu_named("cpu"))
        if known is not None and known.is_elsewhere:
            found[processor] = count
            timed = "another CPU" if known.measured_on is None else known.measured_on.in_words
    if not found:
        return None
    where = " and ".join(processor.in_words for processor in found)
    many = f"{found.total()} CPU record{'s' * (found.total() != 1)}"
    return f"{many} of {where} set against ops on {timed}: there, {COMMAND} times this machine"
