"""Hypothesis without deadlines, and the real data that some tests read."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No test fails for a slow machine: CI shares its cores.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


@pytest.fixture(scope="session")
def source_cache() -> Path:
    """The folder of real raw files (PSYCHOCOUNSEL_SOURCES); without it the test is skipped, or fails under PSYCHOCOUNSEL_NO_SKIP=1."""
    folder = os.environ.get("PSYCHOCOUNSEL_SOURCES")
    if folder and Path(folder).is_dir():
        return Path(folder)
    reason = "needs the source cache: set PSYCHOCOUNSEL_SOURCES to a folder of raw files"
    if os.environ.get("PSYCHOCOUNSEL_NO_SKIP") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
