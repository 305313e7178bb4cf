"""The benchmark of the whole workflow still runs, from raw files to report, and its second run asks nothing."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_benchmark_runs_and_asks_nothing_twice():
    done = subprocess.run(
        [sys.executable, "benchmarks/full_scale.py", "--speeches", "40", "--delay", "0", "--rerun"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = done.stdout.split("The same without results")
    asked = [line.split() for line in first.splitlines() if line.startswith("rate_responses ")][0]
    kept = [line.split() for line in second.splitlines() if line.startswith("rate_responses ")][0]
    assert asked[7] == kept[9] == "280", "seven calls a speech, then all from the journal"
    assert kept[7] == asked[9] == "0"
