"""Predict what a transformer holds and how fast it runs."""

from planner.errors import ConfigError as ConfigError
from planner.huggingface import read_config as read_config
from planner.model import Model as Model
