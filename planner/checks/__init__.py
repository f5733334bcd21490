"""Sharp edges of a config or of source code: `planner.check`. Nothing here runs what it checks."""

from planner.checks.check import check as check
