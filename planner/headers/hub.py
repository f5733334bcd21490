"""`hf:org/name[@revision]`: config and headers from the Hugging Face Hub, and nothing else of it.

The one place of planner that reaches for the network, and only when a name begins with `hf:`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from planner.errors import ConfigError, shown
from planner.findings import Finding
from planner.headers.safetensors_files import (
    check_shard,
    check_spans,
    index_mismatches,
    joined,
    stored,
)
from planner.headers.stored import StoredTensor

PREFIX = "hf:"
NAME = re.compile(r"hf:(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,200}))?")
REASONS = {
    "GatedRepoError": "the repository is gated, and access was not granted to this machine",
    "RepositoryNotFoundError": "no such repository, or it is private",
    "RevisionNotFoundError": "no such revision",
    "RemoteEntryNotFoundError": "the repository has no config.json",
    "EntryNotFoundError": "the repository has no config.json",
    "NotASafetensorsRepoError": "the repository has no model.safetensors and no index of shards",
    "LocalEntryNotFoundError": "the Hub cannot be reached, and nothing of it is in the cache",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "ConnectError": "the Hub cannot be reached",
    "ConnectTimeout": "the Hub cannot be reached",
    "ReadTimeout": "the Hub does not answer",
}
T = TypeVar("T")


def is_hub(source: str) -> bool:
    """Whether a name asks for the Hub."""
    return source.startswith(PREFIX)


def parsed(source: str) -> tuple[str, str | None]:
    """(org/name, revision or None); ConfigError for anything else."""
    match = NAME.fullmatch(source)
    if match is None or ".." in source:
        raise ConfigError(f"model={shown(source)} is not allowed: hf:org/name or hf:org/name@rev")
    return match["repo"], match["revision"]


def hub_config(source: str) -> Path:
    """The config.json of a repository, in huggingface_hub's own cache."""
    repo, revision = parsed(source)
    hub = _hub()
    return Path(_asked(source, lambda: hub.hf_hub_download(repo, "config.json", revision=revision)))


def read_hub(source: str) -> tuple[tuple[StoredTensor, ...], tuple[Finding, ...]]:
    """The tensors of a repository, by the headers of its safetensors files."""
    repo, revision = parsed(source)
    hub = _hub()
    metadata = _asked(source, lambda: hub.get_safetensors_metadata(repo, revision=revision))
    files = []
    for name, header in sorted(metadata.files_metadata.items()):
        file = check_shard(name, origin=source)
        spans = [
            stored(
                tensor,
                dtype=info.dtype,
                shape=info.shape,
                data_offsets=info.data_offsets,
                file=file,
                origin=f"{source}: {file}",
            )
            for tensor, info in header.tensors.items()
        ]
        check_spans(spans, origin=f"{source}: {file}")
        files.append(tuple(tensor for _, tensor in spans))
    tensors = joined(files)
    weight_map = dict(metadata.weight_map) if metadata.sharded else {}
    return tensors, tuple(index_mismatches(weight_map, tensors, source) if weight_map else ())


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(
            "hf: needs the package huggingface_hub: pip install 'transformer-planner[files]'"
        ) from None
    return huggingface_hub


def _asked(source: str, ask: Callable[[], T]) -> T:
    """The answer of the Hub; whatever goes wrong on the way is one line."""
    try:
        return ask()
    except Exception as error:  # of huggingface_hub, of its HTTP library, of the system beneath
        kinds = [kind.__name__ for kind in type(error).__mro__]
        reason = next((REASONS[kind] for kind in kinds if kind in REASONS), None)
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise ConfigError(f"{source} cannot be read: {reason or f'{kinds[0]}: {said}'}") from None
