"""One copy of the project and one finished run for all tests of the micro study."""

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from tests.project import Project, project_copy


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Iterator[Project]:
    """Copy the project, build the micro model, start the scripted server."""
    with project_copy(tmp_path_factory.mktemp("project")) as project:
        yield project


@pytest.fixture(scope="session")
def killed(project) -> Counter:
    """Start the run, kill -9 Snakemake and its jobs while the reward model is trained; return what was asked of the server."""
    process = subprocess.Popen(
        project.command(), **project.options(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    log = project.folder / "logs/micro/train_reward_model/micro-reward.log"
    deadline = time.monotonic() + 600
    while not log.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert log.is_file(), "the run ended before it trained"
    return project.asked()


@pytest.fixture(scope="session")
def finished(project, killed) -> subprocess.CompletedProcess:
    """Resume the killed run and let it end."""
    assert project.snakemake("--unlock").returncode == 0
    done = project.snakemake()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done
