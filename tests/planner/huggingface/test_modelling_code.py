"""The transformers code that programs were written beside, against the installed version."""

from __future__ import annotations

import json

from tools.modelling_code import STORED, fingerprint, fingerprints


def test_the_code_that_programs_follow_has_not_moved():
    stored = json.loads(STORED.read_text())
    found = fingerprints()
    moved = sorted(name for name in found if found[name] != stored["files"].get(name))
    assert not moved, (
        f"transformers moved since {stored['transformers']}: {', '.join(moved)}; read them again "
        "beside planner/runtimes/transformers_code, then run tools/modelling_code.py"
    )


def test_a_comment_does_not_count_and_a_change_does(tmp_path):
    file = tmp_path / "code.py"
    file.write_text('def f(x):\n    """Adds."""\n    return x + 1\n')
    before = fingerprint(file)
    file.write_text("def f(x):\n    # adds one\n    return x + 1\n")
    assert fingerprint(file) == before
    file.write_text("def f(x):\n    return x + 2\n")
    assert fingerprint(file) != before
