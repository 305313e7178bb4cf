"""The journal: what was written survives a kill, a torn end costs only itself, damage is named, two jobs never share one."""

import errno
import os
import resource
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from psychocounsel import journal as journal_module
from psychocounsel.errors import UserError
from psychocounsel.journal import Journal, add_tokens, peek, rendered

ANSWER = {"text": "I hear you.", "finish_reason": "stop", "usage": {"prompt_tokens": 5, "completion_tokens": 3}, "served_model": "m"}
A, B, C = (bytes([number]) * 32 for number in range(3))
KEYS = [A, B, C]


def outcome(key: bytes, answer: dict | None = ANSWER, raw: tuple = (), spent: int = 3) -> dict:
    tokens = {"prompt_tokens": 5, "completion_tokens": spent, "cached_tokens": 0}
    return {"key": key.hex(), "answer": answer, "reason": None if answer else "no", "raw": list(raw), "spent": tokens}


def without_crc(found: dict) -> dict:
    return {name: value for name, value in found.items() if name != "crc"}


def answered(path: Path) -> dict[bytes, dict]:
    """Open a journal; return its answers by key."""
    with Journal(path, KEYS) as journal:
        return {key: without_crc(journal.outcome(key)) for key in KEYS if key in journal}


def test_what_was_added_is_there_at_once_and_on_opening(tmp_path):
    path = tmp_path / "new folder" / "j.jsonl"
    with Journal(path, KEYS) as journal:
        journal.add(outcome(A))
        journal.add(outcome(B, ANSWER | {"text": "ö" * 10_000}))
        journal.add(outcome(C))
        assert journal.outcome(A)["answer"] == ANSWER
        assert journal.outcome(C)["key"] == C.hex()
    assert len(journal.outcome(B)["answer"]["text"]) == 10_000, "also when it is closed"
    assert answered(path) == {A: outcome(A), B: outcome(B, ANSWER | {"text": "ö" * 10_000}), C: outcome(C)}


def test_a_failure_is_no_answer_and_its_tokens_count(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, KEYS) as journal:
        journal.add(outcome(A, answer=None, raw=["mumble", "mumble"], spent=10))
        assert journal.outcome(A)["raw"] == ["mumble", "mumble"]
    with Journal(path, KEYS) as journal:
        assert A not in journal
        journal.add(outcome(A, spent=4))
        assert journal.outcome(A)["answer"] == ANSWER
        assert A not in journal.failures
    with Journal(path, KEYS) as journal:
        assert journal.outcome(A)["answer"] == ANSWER
        assert journal.spent["completion_tokens"] == 14
        assert journal.served_models == {"m"}
    assert b"mumble" in path.read_bytes(), "the texts of failed attempts stay"


def test_other_requests_lines_count_for_nothing(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, KEYS) as journal:
        journal.add(outcome(A))
        journal.add(outcome(B))
    with Journal(path, [B]) as journal:
        assert A not in journal
        assert journal.spent["completion_tokens"] == 3


def test_journals_of_older_runs_without_checksums_are_read(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(orjson.dumps(outcome(A)) + b"\n" + orjson.dumps(outcome(B)) + b"\n")
    assert answered(path) == {A: outcome(A), B: outcome(B)}
    assert set(peek(path)) == {A.hex(), B.hex()}


# Damage -------------------------------------------------------------------------------------------------------------------------------


@given(cut=st.integers(1, 400), text=st.text(max_size=30))
def test_a_torn_last_line_costs_only_itself(tmp_path_factory, cut, text):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    whole, last = rendered(outcome(A, ANSWER | {"text": text})), rendered(outcome(B))
    path.write_bytes(whole + last[: -min(cut, len(last) - 1)])
    assert set(peek(path)) == {A.hex()}
    with Journal(path, KEYS) as journal:
        assert [key for key in KEYS if key in journal] == [A]
        journal.add(outcome(C))
    assert set(answered(path)) == {A, C}


@given(st.data())
def test_what_a_power_cut_leaves_at_the_end_is_dropped(tmp_path_factory, data):
    """The file has its size, but pages that had not reached the disk hold NUL bytes."""
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    whole, second, third = (rendered(outcome(key)) for key in KEYS)
    unsynced = second + third
    hole = data.draw(st.integers(0, len(unsynced) - 1))
    end = data.draw(st.integers(max(hole, len(second)) + 1, len(unsynced)))  # what was written after the hole may have come down before
    path.write_bytes(whole + unsynced[:hole] + b"\0" * (end - hole) + unsynced[end:])
    expected = [A, B] if hole >= len(second) else [A]
    assert answered(path) == {key: outcome(key) for key in expected}
    assert path.read_bytes() == b"".join(rendered(outcome(key)) for key in expected)


WHOLE = b"".join(rendered(outcome(key)) for key in KEYS)
END_OF_SECOND = WHOLE.rindex(b"\n", 0, -1)


@given(place=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255))
@example(place=END_OF_SECOND, value=0)
@settings(max_examples=300)
def test_no_damage_is_ever_misread(tmp_path_factory, place, value):
    """One byte of a journal is altered: its line is refused by file and line, or dropped as a torn end; never is another answer read."""
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    content = bytearray(WHOLE)
    line = content[:place].count(b"\n") + 1
    changed = content[place] != value
    content[place] = value
    path.write_bytes(content)
    if not changed:
        assert len(answered(path)) == 3
    elif line == 3 and (value == 0 or place == len(content) - 1):
        assert answered(path) == {A: outcome(A), B: outcome(B)}, "as a power cut or a kill leaves it"
    elif (place, value) == (END_OF_SECOND, 0):
        assert answered(path) == {A: outcome(A)}, "a hole over the end of a line: with the line after it, one torn end"
    else:
        with pytest.raises(UserError, match=rf"j\.jsonl:{line}: "):
            answered(path)
        assert path.read_bytes() == content, "nothing is thrown away"


@pytest.mark.parametrize("broken", [b'{"key": "b", "ans', b'{"key": "bb"}', b"[1]", b"", b"\0\0\0"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken):
    path = tmp_path / "j.jsonl"
    good = orjson.dumps(outcome(A))
    path.write_bytes(good + b"\n" + broken + b"\n" + good + b"\n")
    with pytest.raises(UserError, match=r"j\.jsonl:2.*sed -i 2d"), Journal(path, KEYS):
        pass
    with pytest.raises(UserError, match=r"j\.jsonl:2"):
        peek(path)
    assert path.read_bytes().startswith(good + b"\n" + broken), "nothing is thrown away"
    subprocess.run(["sed", "-i", "2d", path], check=True)
    assert answered(path) == {A: outcome(A)}, "the remedy that the message names"


@pytest.mark.parametrize("content", [b"", b"torn", b"x" * 200_000])
def test_a_journal_without_a_whole_line_begins_anew(tmp_path, content):
    path = tmp_path / "j.jsonl"
    path.write_bytes(content)
    assert answered(path) == {}
    assert path.read_bytes() == b""


# The disk -----------------------------------------------------------------------------------------------------------------------------


def test_lines_are_synced_in_groups_while_others_are_added(tmp_path, monkeypatch):
    synced, done = [], threading.Event()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("j.jsonl"):
            synced.append(os.fstat(descriptor).st_size)
            done.set()

    monkeypatch.setattr(journal_module.os, "fsync", fsync)
    monkeypatch.setattr(journal_module, "SYNC_EVERY_S", 0.05)
    with Journal(tmp_path / "j.jsonl", KEYS) as journal:
        for _ in range(50):
            journal.add(outcome(A))
        assert done.wait(60), "without another line to come"
        assert synced[-1] <= journal.end
        assert len(synced) < 50, "not one by one"
        journal.add(outcome(B))
    assert synced[-1] == journal.end, "all of it at the end"


@pytest.mark.parametrize("length", [100, 50_000])
def test_a_full_disk_leaves_no_piece_of_a_line_before_the_next(tmp_path, length):
    """Answers under way still come in when others have made room."""
    path = tmp_path / "j.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path, KEYS) as journal:
        journal.add(outcome(A))
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.end + 50, before[1]))
        try:
            with pytest.raises(UserError, match=r"j\.jsonl cannot be written: File too large\. What it holds is kept: make room"):
                journal.add(outcome(B, ANSWER | {"text": "x" * length}))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        journal.add(outcome(C))
        assert journal.outcome(C)["key"] == C.hex()
    assert answered(path) == {A: outcome(A), C: outcome(C)}


def test_a_disk_that_fails_stops_the_job(tmp_path, monkeypatch):
    failed = threading.Event()

    def fsync(_: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal_module.os, "fsync", fsync)
    with Journal(tmp_path / "j.jsonl", KEYS) as journal:
        assert failed.wait(60)
        journal.syncing.join()
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            journal.add(outcome(A))


def test_another_job_cannot_open_it(tmp_path):
    path = tmp_path / "j.jsonl"
    program = (
        "import sys; sys.path.insert(0, 'scripts'); from pathlib import Path; from psychocounsel.journal import Journal\n"
        f"with Journal(Path({str(path)!r}), []): print('open')"
    )
    with Journal(path, KEYS):
        second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "another job writes this journal" in second.stderr
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "open\n"


def test_memory_does_not_grow_with_the_texts(tmp_path):
    path, count = tmp_path / "j.jsonl", 5000
    keys = [number.to_bytes(32, "big") for number in range(count)]
    path.write_bytes(b"".join(rendered(outcome(key, ANSWER | {"text": "x" * 4000})) for key in keys))
    tracemalloc.start()
    with Journal(path, keys) as journal:
        assert all(key in journal for key in keys)
        held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / count < 150


def test_tokens_add_up_where_some_are_not_counted():
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": None}
    assert add_tokens(add_tokens({}, usage), usage) == {"prompt_tokens": 4, "completion_tokens": 6, "cached_tokens": 0}
    assert add_tokens({}, None) == {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
