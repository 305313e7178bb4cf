"""One copy of the project for all tests of the micro study."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.project import Project, project_copy  # noqa: E402


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Iterator[Project]:
    """Copy the project, build the micro model, start the scripted server."""
    with project_copy(tmp_path_factory.mktemp("project")) as project:
        yield project
