"""Predict what a transformer holds and how fast it runs."""

from planner.capacity import max_batch as max_batch
from planner.capacity import max_context_tokens as max_context_tokens
from planner.catalog.gpus import Gpu as Gpu
from planner.catalog.gpus import gpu_named as gpu_named
from planner.catalog.gpus import gpus as gpus
from planner.checkpoint import Checkpoint as Checkpoint
from planner.checkpoint import read_checkpoint as read_checkpoint
from planner.errors import ConfigError as ConfigError
from planner.estimate import estimate as estimate
from planner.estimate import kv_cache_bytes as kv_cache_bytes
from planner.findings import Finding as Finding
from planner.huggingface import read_config as read_config
from planner.latency import Latency as Latency
from planner.loading import catalogue as catalogue
from planner.loading import load_model as load_model
from planner.model import Model as Model
from planner.result import Estimate as Estimate
from planner.result import Memory as Memory
from planner.workload import CacheSpec as CacheSpec
from planner.workload import Deployment as Deployment
from planner.workload import Inference as Inference
from planner.workload import Training as Training
