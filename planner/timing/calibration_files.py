"""Where a device's calibration lies: a folder of one's own, then the catalogue.

`planner calibrate` writes `measurements/calibration/<gpu>.json` under the current directory, beside
the records of `planner profile`, and there planner looks before it takes the catalogue's. The
environment variable PLANNER_CALIBRATION names another folder, or, empty, none. Files of an
installed package are never written.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

Stamp: TypeAlias = tuple[str, int] | None
"""A file and when it was written; None: there is none."""
FOLDER = Path("measurements") / "calibration"
VARIABLE = "PLANNER_CALIBRATION"


def own_folder() -> Path | None:
    """The folder of one's own; None where there shall be none."""
    named = os.environ.get(VARIABLE)
    if named is None:
        return FOLDER
    return Path(named) if named else None


def own_file(gpu: str) -> Path:
    """Where `planner calibrate` writes."""
    return (own_folder() or FOLDER) / f"{gpu}.json"


def own_text(gpu: str) -> str | None:
    """What one's own file says; None where there is none."""
    folder = own_folder()
    path = None if folder is None else folder / f"{gpu}.json"
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None


def own_stamp(gpu: str) -> Stamp:
    """One's own file and when it was written: what is remembered of times holds as long as that."""
    folder = own_folder()
    path = Path() if folder is None else folder / f"{gpu}.json"
    try:
        return None if folder is None else (str(path.absolute()), path.stat().st_mtime_ns)
    except OSError:
        return None


def committed_text(gpu: str) -> str | None:
    """What the catalogue's file says; None where there is none."""
    path = files("planner.catalog").joinpath("calibration", f"{gpu}.json")
    return path.read_text(encoding="utf-8") if path.is_file() else None
