"""A download goes on after Snakemake and its job were killed: what Snakemake clears away at the next start is not what had come."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tests.fakes.file_server import file_server
from tests.project import copy_project

pytestmark = pytest.mark.slow

BODY = b"text\n" + b"".join(
    b"I have felt low for weeks and cannot say why; this is line %d of what I wrote down.\n" % n for n in range(20_000)
)
RAW = "work/mine/sources/mine/file.csv"


def test_a_download_goes_on_after_snakemake_was_killed(tmp_path):
    copy_project(tmp_path)
    hub = {"hub": {"repository": "org/set", "path": "file.csv"}, "revision": "a" * 40, "sha256": hashlib.sha256(BODY).hexdigest()}
    source = {"kind": "speeches", "title": "mine", "adapter": "generic", "file": "mine/file.csv", "columns": {"text": "text"}, **hub}
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump({"mine": source | {"licence": "MIT", "quotable": False}}))
    study = {"run": "mine", "sources": ["mine"], "files": {"sources": ["config/sources.yaml", "sources.yaml"]}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", "config/demo.yaml", "mine.yaml"]
    with file_server(BODY) as mirror:
        options = {
            "cwd": tmp_path,
            "env": {k: v for k, v in os.environ.items() if k != "PSYCHOCOUNSEL_SOURCES"} | {"HF_ENDPOINT": mirror.url},
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.STDOUT,
        }
        mirror.plan = ["trickle"]
        process = subprocess.Popen([*command, "--", RAW], **options, start_new_session=True)
        assert mirror.trickling.wait(120)
        partial = Path(tmp_path, RAW).with_name(".file.csv.partial")
        deadline = time.monotonic() + 60
        while (not partial.exists() or partial.stat().st_size < 400_000) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        have = partial.stat().st_size
        subprocess.run([*command, "--unlock"], **options, check=True)
        subprocess.run([*command, "--", RAW], **options, check=True)
        assert mirror.starts == [0, have]
    assert Path(tmp_path, RAW).read_bytes() == BODY
    assert not partial.exists()
