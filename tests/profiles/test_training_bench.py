"""What is measured of a training step is what was asked for."""

import pytest
import torch

import planner
from attnlab.training import training_step
from profiles.meters import LiveTensorMeter
from profiles.training_bench import TrainingRun
from profiles.workloads import AttnlabWorkload
from tests.attnlab.families import FAMILIES

HOW = [
    {},
    {"checkpointing": "full", "checkpoint_every": 2},
    {"checkpointing": "selective"},
    {"loss_chunk_tokens": 5},
]


@pytest.mark.parametrize("lora", [None, planner.LoRA(rank=2)])
@pytest.mark.parametrize("how", HOW)
def test_a_step_of_attnlab_runs_as_it_is_asked_to(how, lora):
    model = planner.read_config(FAMILIES["llama"]().to_dict())
    workload = AttnlabWorkload(model, attention=None, dtype="fp32", device=torch.device("cpu"))
    method = "full" if lora is None else "lora"
    work = planner.Training(
        batch=2, sequence_tokens=9, optimizer=None, method=method, lora=lora, **how
    )
    ids = torch.randint(model.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    run, peaks = TrainingRun(workload, work, ids), []
    for step in (run.step, lambda: training_step(run.module, ids, ids, **how)):
        with LiveTensorMeter() as meter:
            step()
        peaks.append(meter.peak_bytes)
        run.module.zero_grad(set_to_none=True)
    assert peaks[0] == peaks[1]
    trained = {name for name, p in run.module.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained) is (lora is not None)
