"""Single ops timed on a device: what a latency model is fitted on, and held to.

point.py            one op to time: family, op, shape, dtype, backend, split
points.py           the named list, most useful first; *_points.py its families
costs.py            FLOPs and the least bytes of a point, from its shape
buffers.py          random data, drawn once, from which every op's inputs are cut
ops.py              point → the call that is timed; *_ops.py its families
timing.py           CUDA-graph replay, event-timed loop, host clock
op_record.py        what was seen, as JSON Lines
run.py              the bounded, resumable run; table.py what it prints

`points`, `costs` and `op_record` do not load torch.
"""
