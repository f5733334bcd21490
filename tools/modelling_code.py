"""Fingerprints of the transformers code that planner/runtimes/transformers_code was written beside.

    python tools/modelling_code.py  # rewrites tests/planner/huggingface/modelling_code.json

A test compares them with the installed version and names the files that moved: their classes have
to be read again, and the programs held against them, before the fingerprints are renewed.
Comments and docstrings do not count.
"""

from __future__ import annotations

import ast
import hashlib
import json
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from planner.runtimes.transformers import EXACT_PEAKS

FOLDER = Path(__file__).parents[1]
STORED = FOLDER / "tests" / "planner" / "huggingface" / "modelling_code.json"
SHARED = (
    "activations.py",
    "cache_utils.py",
    "integrations/moe.py",
    "integrations/sdpa_attention.py",
    "loss/loss_utils.py",
    "masking_utils.py",
    "modeling_layers.py",
    "modeling_rope_utils.py",
    "pytorch_utils.py",
)
"""Files that every model runs."""


def installed() -> Path:
    """The folder of the installed transformers."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def fingerprint(file: Path) -> str:
    """Of what a file does: its lines without docstrings, blank lines and those of comments.

    Not of the syntax tree, whose dump differs between Python versions.
    """
    text = file.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    kept = (
        line.rstrip()
        for number, line in enumerate(text.splitlines(), start=1)
        if number not in docstrings and line.strip() and not line.lstrip().startswith("#")
    )
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]


def fingerprints() -> dict[str, str]:
    """By path inside the package: the shared files, and the classes of every held type."""
    root = installed()
    folders = sorted({kind.removesuffix("_text") for kind in EXACT_PEAKS})
    files = [*SHARED, *(f"models/{name}/modeling_{name}.py" for name in folders)]
    return {name: fingerprint(root / name) for name in files}


def main() -> None:
    """Write the fingerprints of the installed version."""
    found = {"transformers": metadata.version("transformers"), "files": fingerprints()}
    STORED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
