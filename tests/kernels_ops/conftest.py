"""Tests marked `interpreted` run in processes that have Triton's interpreter from the start."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if item.get_closest_marker("interpreted"):
            item.add_marker(pytest.mark.skip(reason="set TRITON_INTERPRET=1 before pytest starts"))
