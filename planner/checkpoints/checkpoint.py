"""What lies in the weight files: exact bytes, the mix of dtypes, and how it fits the config.

Headers alone are read, of safetensors and GGUF files; pickled weights are never opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from planner.checkpoints.comparison import QUANTISED, compare
from planner.checkpoints.gguf_names import compare_gguf
from planner.checkpoints.quantised_files import compare_quantised
from planner.errors import ConfigError, shown
from planner.findings import Finding
from planner.headers.gguf_files import find_gguf, read_gguf
from planner.headers.hub import is_hub, read_hub
from planner.headers.safetensors_files import PICKLED, read_folder, read_safetensors
from planner.headers.stored import DtypeShare, StoredTensor, dtype_mix
from planner.loading import load_model
from planner.model import Model

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The tensors of a folder, a file or a Hub repository.

    `findings` are those of the files themselves, a missing shard say; `architecture` is GGUF's.
    """

    path: str
    kind: Literal["safetensors", "gguf"]
    tensors: tuple[StoredTensor, ...]
    findings: tuple[Finding, ...] = ()
    architecture: str = ""

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors, headers and padding left out."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that tensors lie in."""
        return tuple(sorted({tensor.file for tensor in self.tensors}))

    def dtype_mix(self) -> tuple[DtypeShare, ...]:
        """Tensors, elements and bytes of every dtype, the largest first."""
        return dtype_mix(self.tensors)

    def compare(self, model: Model) -> tuple[Finding, ...]:
        """The findings of the files, and what they lack or have more than `model` says."""
        if self.kind == "gguf":
            return (*self.findings, *compare_gguf(model, self.tensors, self.architecture))
        quantised = any(QUANTISED.search(tensor.name) for tensor in self.tensors)
        if quantised or model.quantization is not None:
            return (*self.findings, *compare_quantised(model, self.tensors))
        return (*self.findings, *compare(model, self.tensors))

    def table(self) -> pd.DataFrame:
        """A row for each tensor: name, dtype, shape, count, bytes, file."""
        import pandas as pd

        columns = ["name", "dtype", "shape", "count", "bytes", "file"]
        rows = [(t.name, t.dtype, t.shape, t.count, t.size_bytes, t.file) for t in self.tensors]
        return pd.DataFrame(rows, columns=columns).astype({"dtype": "category", "file": "category"})


def read_checkpoint(source: str | Path) -> Checkpoint:
    """The headers of a model folder, a .safetensors or .gguf file, or `hf:org/name[@revision]`.

    Raises ConfigError where there are no such files or a header is not what it says.
    """
    if isinstance(source, str) and is_hub(source):
        tensors, findings = read_hub(source)
        return Checkpoint(path=source, kind="safetensors", tensors=tensors, findings=findings)
    if not isinstance(source, str | Path):
        raise ConfigError(f"files={shown(source)} is not allowed: a folder, a file or hf:org/name")
    path = Path(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # too long for a path, or a null byte in it
        is_folder = is_file = False
    if is_folder:
        return _from_folder(path)
    if not is_file:
        raise ConfigError(
            f"files={shown(str(source))} is neither a folder nor a file that can be read"
        )
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.suffix == ".safetensors":
        return Checkpoint(path=str(path), kind="safetensors", tensors=read_safetensors(path))
    if path.suffix in PICKLED:
        raise ConfigError(
            f"{path} holds pickled weights, which can run code and are never opened: convert them "
            "to safetensors"
        )
    if path.name == "config.json":
        return _from_folder(path.parent)
    raise ConfigError(f"{path} is not a .safetensors or .gguf file")


def _from_folder(folder: Path) -> Checkpoint:
    if not any(folder.glob("*.safetensors*")):
        gguf = find_gguf(folder)
        if gguf is not None:
            return _from_gguf(gguf)
    tensors, findings = read_folder(folder)
    return Checkpoint(path=str(folder), kind="safetensors", tensors=tensors, findings=findings)


def _from_gguf(path: Path) -> Checkpoint:
    header, findings = read_gguf(path)
    return Checkpoint(
        path=str(path),
        kind="gguf",
        tensors=header.tensors,
        findings=findings,
        architecture=str(header.metadata.get("general.architecture", "")),
    )


def compare_files(source: str | Path) -> tuple[Checkpoint, tuple[Finding, ...]]:
    """The files, and how they fit the config beside them; that it cannot be read is a finding."""
    checkpoint = read_checkpoint(source)
    path = Path(source)
    beside = path.parent if path.suffix == ".safetensors" and path.is_file() else source
    try:
        return checkpoint, checkpoint.compare(load_model(beside))
    except ConfigError as error:
        unread = Finding(
            id="not-compared",
            severity="warning",
            title="The files are compared with no config",
            seen=str(error),
            why="The bytes are exact; that every tensor is there is not checked.",
            where=checkpoint.path,
        )
        return checkpoint, (*checkpoint.findings, unread)
