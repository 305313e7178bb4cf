"""Where a raw file comes from, what is checked, and downloads that break off; the server is a real one on 127.0.0.1."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.fakes.file_server import file_server
from tests.fakes.hub import TOKEN, FakeHub, Repository

from fetch_source import main
from psychocounsel.provenance import read_record, record_path
from psychocounsel.stage import log

BODY = bytes(range(256)) * 4000  # about 1 MB
NEWER = bytes(reversed(range(256))) * 4000
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    with file_server(BODY) as server:
        yield server


@pytest.fixture
def fetch(tmp_path, monkeypatch, capsys):
    """Run the program; return the bytes that it puts in place, or its error message."""
    monkeypatch.delenv("PSYCHOCOUNSEL_SOURCES", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def run(*settings, cache=None):
        out = tmp_path / "raw" / "file"
        words = [
            "scripts/fetch_source.py",
            "--out",
            str(out),
            "--settings",
            "source=mine",
            *settings,
            *(["--cache", str(cache)] if cache else []),
        ]
        monkeypatch.setattr("sys.argv", words)
        for file in (out, record_path(out)):
            file.unlink(missing_ok=True)
        try:
            main()
        except SystemExit:
            left = {file.name for file in out.parent.glob("*")} if out.parent.exists() else set()
            assert left <= {".file.partial", ".file.partial.version"}, "nothing else may be left behind"
            return capsys.readouterr().err
        assert {file.name for file in out.parent.glob("*")} == {"file", "file.prov.json"}
        return out.read_bytes()

    return run


def address(server):
    return f"address={server.url}/file.csv"


def test_order_is_cache_then_path_then_address(fetch, tmp_path, server, monkeypatch):
    cache, path = tmp_path / "cache", tmp_path / "own.csv"
    (cache / "sub").mkdir(parents=True)
    path.write_bytes(b"path")
    both = ("file=sub/file.csv", f"path={path}", address(server))
    assert fetch(*both, cache=cache) == b"path"
    (cache / "sub" / "file.csv").write_bytes(b"cache")
    assert fetch(*both, cache=cache) == b"cache"
    assert fetch(*both) == b"path"
    monkeypatch.setenv("PSYCHOCOUNSEL_SOURCES", str(cache))
    assert fetch(*both) == b"cache"
    assert fetch(address(server)) == BODY
    assert server.starts == [0]


def test_sha256_is_checked_wherever_the_file_comes_from(fetch, tmp_path, server):
    (tmp_path / "file.csv").write_bytes(b"altered")
    for origin in (("file=file.csv",), (f"path={tmp_path / 'file.csv'}",), (address(server),)):
        message = fetch(*origin, f"sha256={'0' * 64}", cache=tmp_path)
        assert "is not the file that sources.yaml names" in message
        assert "0" * 64 in message
    assert fetch(address(server), f"sha256={SHA256}") == BODY


def test_a_body_that_breaks_off_is_continued(fetch, server):
    server.plan = ["cut", "cut"]
    assert fetch(address(server), f"sha256={SHA256}") == BODY
    assert server.starts == [0, 4 << 16, 8 << 16]  # whole pieces of the 300,000 bytes that came each time


def test_a_later_run_goes_on_where_a_failed_one_ended(fetch, server):
    server.plan = ["cut", 404]
    assert "404" in fetch(address(server))
    server.starts.clear()
    assert fetch(address(server)) == BODY
    assert server.starts == [4 << 16]


def test_a_download_that_broke_off_at_its_very_end_is_whole(fetch, server, tmp_path):
    server.plan = ["cut", 404]
    fetch(address(server))
    (tmp_path / "raw" / ".file.partial").write_bytes(BODY)
    assert fetch(address(server)) == BODY


@pytest.mark.parametrize("sum_known", [True, False])
def test_halves_of_two_versions_are_never_joined(fetch, server, sum_known):
    server.plan = ["cut", 404]
    fetch(address(server))
    server.body = NEWER
    words = [f"sha256={hashlib.sha256(NEWER).hexdigest()}"] if sum_known else []
    assert fetch(address(server), *words) == NEWER
    assert server.starts[-1] == 0


def test_nor_where_the_server_names_no_version(fetch, server):
    """Without a version a known sum alone allows to go on, and catches what does not fit; without either it starts anew."""
    server.etag = False
    for plan, words, starts in [
        (["cut", 404], [f"sha256={SHA256}"], [0, 4 << 16, 4 << 16]),
        (["cut", 404], [], [0, 0, 0]),
    ]:
        server.plan, server.body = list(plan), BODY
        server.starts.clear()
        fetch(address(server), *words)
        assert fetch(address(server), *words) == BODY
        assert server.starts == starts
    server.plan = ["cut", 404]
    fetch(address(server), f"sha256={SHA256}")
    server.body = NEWER
    server.starts.clear()
    assert fetch(address(server), f"sha256={hashlib.sha256(NEWER).hexdigest()}") == NEWER
    assert server.starts == [4 << 16, 0]


def test_a_server_that_continues_another_version_is_not_believed(fetch, server):
    server.plan = ["cut", 404]
    fetch(address(server))
    server.body, server.plan = NEWER, ["ignore If-Range"]
    assert fetch(address(server)) == NEWER


def test_a_partial_file_of_another_address_is_not_continued(fetch, server):
    server.plan = ["cut", 404]
    fetch(address(server))
    server.starts.clear()
    assert fetch(address(server).replace("file.csv", "other.csv"), f"sha256={SHA256}") == BODY
    assert server.starts == [0]


def test_after_a_kill_the_same_command_goes_on(server, tmp_path):
    server.plan = ["trickle"]
    out = tmp_path / "raw" / "file"
    settings = json.dumps({"source": "mine", "address": address(server).removeprefix("address="), "sha256": SHA256})
    command = [sys.executable, "scripts/fetch_source.py", "--out", str(out), "--settings", settings]
    environment = {key: value for key, value in os.environ.items() if key != "PSYCHOCOUNSEL_SOURCES"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert server.trickling.wait(60)
    partial = out.with_name(".file.partial")
    deadline = time.monotonic() + 30
    while partial.stat().st_size < 400_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "another process is downloading it" in second.stderr
    process.kill()
    process.wait()
    have = partial.stat().st_size
    assert 0 < have < len(BODY)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert out.read_bytes() == BODY
    assert server.starts == [0, have]
    assert sorted(Path(out.parent).glob(".*")) == []


def test_a_file_of_the_hub_comes_from_its_mirror_with_the_token_of_the_environment(fetch, tmp_path, monkeypatch):
    words = ("address=https://huggingface.co/datasets/org/set/resolve/" + "a" * 40 + "/f.csv", "gated=true", 'access="Ask for it."')
    with FakeHub({"datasets/org/set": Repository("a" * 40, {"f.csv": BODY}, gated=True)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        assert "is gated" in fetch(*words)
        assert hub.requests == []
        monkeypatch.setenv("HF_TOKEN", "hf_of_another_account")
        message = fetch(*words)
        assert "403" in message
        assert "Ask for it." in message
        assert "hf_of_another_account" not in message
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert fetch(*words) == BODY
    assert TOKEN not in record_path(tmp_path / "raw" / "file").read_text()


def test_a_record_says_where_no_sum_was_known(fetch, tmp_path, server):
    record = record_path(tmp_path / "raw" / "file")
    fetch(address(server))
    assert read_record(record)["run"]["facts"] == {"origin": "address", "unpinned": True}
    fetch(address(server), f"sha256={SHA256}")
    assert read_record(record)["run"]["facts"] == {"origin": "address"}


def test_a_server_without_ranges_starts_anew(fetch, server):
    server.plan = ["cut", "ignore range"]
    assert fetch(address(server), f"sha256={SHA256}") == BODY


def test_busy_servers_are_asked_again(fetch, server):
    server.plan = [503, 429]
    assert fetch(address(server)) == BODY
    assert len(server.starts) == 3


def test_what_never_ends_well_is_an_error_that_says_what_to_do(fetch, server):
    server.plan = ["cut"] * 2 + [404]
    message = fetch(address(server), "file=sub/file.csv")
    assert "404" in message
    assert "Place the file as sub/file.csv below the source cache" in message
    server.plan = [503] * 100
    assert "no download" in fetch(address(server))


def test_no_server(fetch, server):
    server.server_close()
    assert "Is this machine offline?" in fetch(address(server))


def test_gated_files_print_the_steps(fetch, server):
    message = fetch("gated=true", 'access="Sign in, accept, place the file."', "file=a.csv", address(server))
    assert "gated" in message
    assert "Sign in, accept, place the file." in message
    assert server.starts == []


def test_nothing_to_fetch_from(fetch, tmp_path):
    assert "has no address" in fetch("file=a.csv", cache=tmp_path)
    assert "no such file" in fetch(f"path={tmp_path / 'none.csv'}")
    assert "no such folder" in fetch("file=a.csv", cache=tmp_path / "none")


def test_settings_are_checked(fetch):
    assert "Did you mean 'address'" in fetch("adress=http://x")
    assert "sha256" in fetch("sha256=abc")


def test_without_a_sum_the_sum_is_logged(fetch, tmp_path, caplog):
    (tmp_path / "file.csv").write_bytes(BODY)
    with caplog.at_level("INFO", log.name):
        assert fetch("file=file.csv", cache=tmp_path) == BODY
    assert SHA256 in caplog.text
