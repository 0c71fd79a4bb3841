"""What the library raises, one class per kind of mistake."""

from __future__ import annotations


class PRWError(Exception):
    """Base of every error the library raises on purpose."""


class ConfigError(PRWError, ValueError):
    """A configuration, a target or an argument that cannot work."""


class StageError(PRWError, RuntimeError):
    """An operation the stage ledger does not allow now."""


class CheckpointError(PRWError, ValueError):
    """A folder that is missing, damaged, too new, or made for another base."""
