"""Token mixers other than attention over all keys and values: recurrences, convolutions."""

from planner.mixers.base import Mixer

__all__ = ["Mixer"]
