"""What verify tells of chains and lists of files; the tampering itself is tried on a finished run (tests/workflow)."""

import os
import signal
import subprocess
import sys

from psychocounsel.verification import downstream, listed


def test_what_was_made_from_a_file_is_found_over_many_steps():
    readers = {"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": {"e"}, "x": {"a"}}
    assert downstream("a", readers) == {"b", "c", "d", "e"}
    assert downstream("a.prov.json", readers) == {"b", "c", "d", "e"}
    assert downstream("e", readers) == set()


def test_a_long_list_is_cut_and_counted():
    assert listed("abc") == "a, b, c"
    assert listed("abcde") == "a, b, c and 2 more"


def test_the_benchmark_runs():
    """Not how fast: that it still makes a run which verifies."""
    done = subprocess.run([sys.executable, "benchmarks/verify_speed.py", "--megabytes", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sha256sum" in done.stdout


def test_a_reader_that_has_seen_enough_ends_the_audit_in_silence():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "scripts/audit.py", "--help"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")
