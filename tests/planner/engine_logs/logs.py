"""Lines of logs that people published, as they were printed; the thread stands above each."""

# github.com/vllm-project/vllm/pull/10511 (0.6.5 to be, `vllm serve meta-llama/Meta-Llama-3-8B`)
TABLE = """\
INFO 12-13 19:54:18 worker.py:243] Memory profiling results:
INFO 12-13 19:54:18 worker.py:243] duration     0.75 seconds
INFO 12-13 19:54:18 worker.py:243] total_gpu_memory     79.22GiB
INFO 12-13 19:54:18 worker.py:243] gpu_memory_utilization       0.90
INFO 12-13 19:54:18 worker.py:243] the current vLLM instance can use    71.29GiB
INFO 12-13 19:54:18 worker.py:243] model weights take   14.96GiB
INFO 12-13 19:54:18 worker.py:243] non_torch_memory     1.79GiB
INFO 12-13 19:54:18 worker.py:243] PyTorch activation peak memory       1.26GiB
INFO 12-13 19:54:18 worker.py:243] available_kv_cache_memory    53.29GiB
"""

# …/issues/10517 (Llama-3.1-8B-Instruct, RTX 3090, max_model_len 29000)
TOO_LONG = """\
Loading model weights took 14.9888 GB
Memory profiling results: total_gpu_memory=23.58GiB initial_memory_usage=15.34GiB \
peak_torch_memory=17.98GiB memory_usage_post_profile=15.35GiB non_torch_memory=0.35GiB \
kv_cache_size=2.89GiB gpu_memory_utilization=0.90
# GPU blocks: 1478, # CPU blocks: 2048
Maximum concurrency for 29000 tokens per request: 0.82x
The model's max seq len (29000) is larger than the maximum number of tokens that can be stored in \
KV cache (23648). Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when \
initializing the engine.
"""

# generative-computing/mellea#416 (0.9 with the first engine)
ONE_LINE = """\
INFO 02-11 10:17:54 [worker.py:294] the current vLLM instance can use total_gpu_memory \
(79.19GiB) x gpu_memory_utilization (0.80) = 63.35GiB
INFO 02-11 10:17:54 [worker.py:294] model weights take 1.12GiB; non_torch_memory takes 0.16GiB; \
PyTorch activation peak memory takes 0.23GiB; the rest of the memory reserved for KV Cache is \
61.84GiB.
INFO 02-11 10:17:54 [executor_base.py:113] # cuda blocks: 36184, # CPU blocks: 2340
INFO 02-11 10:17:54 [executor_base.py:118] Maximum concurrency for 8192 tokens per request: 70.67x
INFO 02-11 10:17:59 [model_runner.py:1671] Graph capturing finished in 2 secs, took 0.13 GiB
"""

# …/issues/17327 (0.8.5, four GPUs)
FOUR_WORKERS = """\
(VllmWorker rank=0 pid=105) INFO 04-29 01:07:41 [gpu_model_runner.py:1347] Model loading took \
14.2474 GiB and 558.868858 seconds
(VllmWorker rank=3 pid=108) INFO 04-29 01:07:41 [gpu_model_runner.py:1347] Model loading took \
14.2474 GiB and 559.041898 seconds
"""

# …/issues/28228 (0.11, two GPUs)
SECOND_ENGINE = """\
(Worker_TP0 pid=26347) INFO 11-06 10:51:48 [gpu_worker.py:349] Available KV cache memory: 2.30 GiB
(EngineCore_DP0 pid=26283) INFO 11-06 10:51:48 [kv_cache_utils.py:1229] GPU KV cache size: 75,840 \
tokens
(EngineCore_DP0 pid=26283) INFO 11-06 10:51:48 [kv_cache_utils.py:1234] Maximum concurrency for \
120,000 tokens per request: 2.48x
"""

# …/issues/34076 (0.15)
NEEDED = """\
(EngineCore_DP0 pid=1094) ValueError: To serve at least one request with the models's max seq len \
(262144), (24.0 GiB KV cache is needed, which is larger than the available KV cache memory \
(3.18 GiB). Based on the available memory, the estimated maximum model length is 34736. Try \
increasing `gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine.
"""

# …/issues/15105 (0.8.0)
OUT_OF_MEMORY = """\
(VllmWorker rank=1 pid=2978) ERROR 03-19 07:27:53 [multiproc_executor.py:375] \
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.74 GiB. GPU 1 has a total capacity \
of 23.57 GiB of which 605.88 MiB is free. Process 133288 has 22.97 GiB memory in use. Of the \
allocated memory 20.21 GiB is allocated by PyTorch, with 128.00 MiB allocated in private pools \
(e.g., CUDA Graphs), and 185.98 MiB is reserved by PyTorch but unallocated.
"""

# …/issues/783 (torch 2.0's words)
OLD_OUT_OF_MEMORY = """\
torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.63 GiB (GPU 0; 44.56 GiB \
total capacity; 27.91 GiB already allocated; 565.31 MiB free; 27.93 GiB reserved in total by \
PyTorch) If reserved memory is >> allocated memory try setting max_split_size_mb
"""

# QwenLM/Qwen3-VL#1684 (0.11.0), and the configuration as 0.11 prints it
ARGUMENTS = """\
(APIServer pid=7101) INFO 10-23 07:59:11 [api_server.py:1839] vLLM API server version 0.11.0
(APIServer pid=7101) INFO 10-23 07:59:11 [utils.py:233] non-default args: {'model_tag': \
'Qwen/Qwen3-30B-A3B-Instruct-2507-FP8', 'model': 'Qwen/Qwen3-30B-A3B-Instruct-2507-FP8', \
'max_model_len': 100000, 'tensor_parallel_size': 2, 'async_scheduling': True}
(EngineCore_DP0 pid=7291) INFO 10-23 07:59:18 [core.py:77] Initializing a V1 LLM engine (v0.11.0) \
with config: model='Qwen/Qwen3-30B-A3B-Instruct-2507-FP8', speculative_config=None, \
dtype=torch.bfloat16, max_seq_len=100000, tensor_parallel_size=2, pipeline_parallel_size=1, \
quantization=fp8, enforce_eager=False, kv_cache_dtype=fp8_e4m3
"""

# gpu_worker.py of 0.19.1, compile_or_warm_up_model, with figures of llm-d-planner's Llama-3.1-8B
ACTUAL_USAGE = """\
(Worker pid=11) INFO 04-18 20:25:07 [gpu_worker.py:639] Free memory on device (78.68/79.19 GiB) on \
startup. Desired GPU memory utilization is (0.95, 75.23 GiB). Actual usage is 14.99 GiB for \
weight, 1.89 GiB for peak activation, 0.25 GiB for non-torch memory, and 0.91 GiB for CUDAGraph \
memory. Replace gpu_memory_utilization config with `--kv-cache-memory=61390000000` (57.17 GiB) to \
fit into requested memory. Current kv cache memory in use is 58.11 GiB.
"""

# a notebook of 2025-02-20 on two A40 (0.7, Qwen2.5-72B-Instruct-AWQ, --tensor-parallel-size 2)
AWQ_72B = """\
config: model='./Qwen2.5-72B-Instruct-AWQ', dtype=torch.float16, quantization=awq_marlin
(VllmWorkerProcess pid=8719) INFO 02-20 15:48:43 model_runner.py:1115] Loading model weights took \
19.3952 GB
(VllmWorkerProcess pid=8719) INFO 02-20 15:49:49 worker.py:267] model weights take 19.40GiB; \
non_torch_memory takes 0.32GiB; PyTorch activation peak memory takes 5.66GiB; the rest of the \
memory reserved for KV Cache is 14.63GiB.
$ vllm serve ./Qwen2.5-72B-Instruct-AWQ --tensor-parallel-size 2
"""
