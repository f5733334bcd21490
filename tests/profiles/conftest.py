"""What earlier tests left is set apart: here garbage is looked for after every step."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def earlier_objects_are_set_apart():
    """A look through the models that other files keep takes a second, here it takes none."""
    gc.freeze()
