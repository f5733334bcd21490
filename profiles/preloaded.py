"""What the server of isolated processes imports once: all that takes seconds, and no device."""

from __future__ import annotations

import contextlib

import pynvml  # noqa: F401
import torch  # noqa: F401

import profiles.worker  # noqa: F401

with contextlib.suppress(ImportError):
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401
    from transformers.models.auto import modeling_auto  # noqa: F401
