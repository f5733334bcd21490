"""Sharp edges in Python source. It is parsed, never imported or executed."""

from planner.checks.source.files import check_source as check_source
from planner.checks.source.files import check_text as check_text
