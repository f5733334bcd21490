"""The empirical side: what a model really held and how long it really took, beside the prediction.

records.py    one measurement as a type, and the append-only JSON Lines store it lives in
nvml.py       what the NVIDIA driver says of a device, through pynvml
meters.py     live-tensor peak, torch's CUDA peaks, synchronised time
workloads.py  the model that is run, one small interface for each runtime
runner.py     `profile`: measure prefill, decode and generation, a record each
microbench/   single ops timed on a device, for a latency model to be fitted on
compare.py    records → predictions of the same work → signed errors

Importing `profiles.records`, `profiles.nvml` or `profiles.compare` does not load torch.
"""
