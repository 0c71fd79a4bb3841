"""The one exception of the sample cache."""

from __future__ import annotations

from prw import PRWError


class CacheError(PRWError, ValueError):
    """A sample cache that is absent, incomplete, damaged, or of something else."""
