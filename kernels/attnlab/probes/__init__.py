"""Sharp edges of a live module: `attnlab.probes.check(module)`."""

from attnlab.probes.check import check as check
