"""Near duplicates against an exhaustive search, and speech selection as a whole."""

import random
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psychocounsel import near_duplicates
from psychocounsel.near_duplicates import NearDuplicates, bands, find_near_duplicates, folded, matches_between, shingle_hashes
from psychocounsel.records import dump_records, read_records
from psychocounsel.texts import speech_id
from select_speeches import SelectSettings, drop_by_length, drop_over_limit, main

WORDS = [f"{a}{b}" for a in ("mor", "tal", "vin", "sep", "lun", "gar", "bel", "nok") for b in ("an", "est", "ily", "ound", "ick", "ome")]


def variants(number: int, seed: int) -> list[str]:
    """Return texts of random words, two in five of which are edits of an earlier one."""
    rng = random.Random(seed)
    texts: list[list[str]] = []
    for _ in range(number):
        if texts and rng.random() < 0.4:
            words = list(rng.choice(texts))
            for _ in range(rng.randint(1, 6)):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
        else:
            words = [rng.choice(WORDS) for _ in range(40)]
        texts.append(words)
    return [" ".join(words) for words in texts]


def similarity(a: str, b: str, size: int) -> float:
    grams = [{text[i : i + size] for i in range(len(text) - size + 1)} for text in (a, b)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def find(texts, drop_above=0.85, cluster_above=0.6):
    return find_near_duplicates(texts, drop_above=drop_above, cluster_above=cluster_above, shingle_chars=8, permutations=128, seed=7)


@pytest.mark.parametrize("seed", range(4))
def test_like_the_exhaustive_search(seed):
    texts = variants(120, seed)
    found = find(texts)
    missed = 0
    for i, (twin, value) in found.twin.items():
        assert twin < i
        assert twin in found.cluster, "the twin of a dropped text must be kept"
        assert value == pytest.approx(similarity(texts[i], texts[twin], 8))
        assert value > 0.85
    assert set(found.cluster) | set(found.twin) == set(range(len(texts)))
    assert not set(found.cluster) & set(found.twin)
    for i, j in combinations(sorted(found.cluster), 2):
        value = similarity(texts[i], texts[j], 8)
        if value > 0.85:
            missed += 1
        elif value > 0.6:
            missed += found.cluster[i] != found.cluster[j]
    assert missed <= 1  # a pair just above the lower threshold is proposed with a chance of 98 %
    graph = {i: {i} for i in found.cluster}
    for i, j in combinations(sorted(found.cluster), 2):
        if similarity(texts[i], texts[j], 8) > 0.6:
            graph[i].add(j), graph[j].add(i)
    for i, first in found.cluster.items():
        assert first in reachable(graph, i), "two texts of one cluster must be linked by similar ones"


def reachable(graph, start):
    seen, waiting = {start}, [start]
    while waiting:
        for near in graph[waiting.pop()] - seen:
            seen.add(near)
            waiting.append(near)
    return seen


def test_thresholds_are_strict_and_exact():
    text = " ".join(WORDS)
    assert find([text, text.upper()], drop_above=0.99, cluster_above=0.9).twin == {1: (0, 1.0)}
    assert find([text, text], drop_above=1.0, cluster_above=1.0).twin == {}
    assert find([text, text], drop_above=1.0, cluster_above=0.9).cluster == {0: 0, 1: 0}
    other = text + " and nothing else that was there before, but this"
    value = similarity(text, other, 8)
    assert not find([text, other], drop_above=value, cluster_above=0.5).twin
    assert find([text, other], drop_above=value - 1e-9, cluster_above=0.5).twin == {1: (0, pytest.approx(value))}


@given(st.floats(0.05, 0.99), st.sampled_from([16, 64, 100, 128, 256]))
def test_bands_reach_the_recall(threshold, permutations):
    count = bands(threshold, permutations)
    assert permutations % count == 0
    assert count == permutations or 1 - (1 - threshold ** (permutations // count)) ** count >= 0.98


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_the_exhaustive_search_where_every_pair_is_proposed(seed):
    texts = variants(80, seed)
    assert bands(0.2, 128) == 128  # bands of one row propose a pair of similarity 0.2 with a chance of 1 - 4e-13
    assert find(texts, drop_above=0.85, cluster_above=0.2) == exhaustively(texts, 0.85, 0.2)


def exhaustively(texts, drop_above, cluster_above):
    """Compare every text with every kept one before it; join clusters by naming all their texts anew."""
    twin, cluster = {}, {}
    for i, text in enumerate(texts):
        similar = [(similarity(text, texts[j], 8), -j) for j in cluster]
        value, j = max(similar, default=(0, 0))
        if value > drop_above:
            twin[i] = (-j, value)
            continue
        near = {cluster[-j] for value, j in similar if value > cluster_above} | {i}
        cluster = {j: min(near) if first in near else first for j, first in {**cluster, i: i}.items()}
    return NearDuplicates(twin, cluster)


def test_a_pair_above_the_threshold_is_found_with_the_promised_chance():
    rng = random.Random(11)
    found = wanted = 0
    for seed in range(400):
        words = [rng.choice(WORDS) + rng.choice(WORDS) for _ in range(40)]
        edited = rng.randint(6, 9)
        other = words[:8] + [rng.choice(WORDS) + rng.choice(WORDS) for _ in range(edited)] + words[8 + edited :]
        texts = [" ".join(words), " ".join(other)]
        if 0.6 < similarity(*texts, 8) < 0.68:
            wanted += 1
            near = find_near_duplicates(texts, drop_above=0.85, cluster_above=0.6, shingle_chars=8, permutations=128, seed=seed)
            found += near.cluster[1] == 0
    assert wanted > 100
    assert found / wanted > 0.96  # 98 % at the threshold; three standard deviations below


def test_work_grows_with_the_number_of_texts(monkeypatch):
    compared = Counter()
    monkeypatch.setattr(near_duplicates, "jaccard", lambda a, b: compared.update(["pairs"]) or len(a & b) / len(a | b))

    def pairs(number):
        compared.clear()
        rng = random.Random(3)
        fresh = [" ".join(rng.choice(WORDS) + rng.choice(WORDS) + str(rng.randrange(50)) for _ in range(40)) for _ in range(number // 2)]
        find([text for original in fresh for text in (original, original[:-1])])
        return compared["pairs"]

    assert pairs(200) == 100
    assert pairs(2000) < 1.05 * 1000  # an exhaustive search compares two million


def test_many_copies_of_one_text_cost_one_comparison_each(monkeypatch):
    compared = []
    monkeypatch.setattr(near_duplicates, "jaccard", lambda a, b: compared.append(1) or 1.0)
    found = find([" ".join(WORDS)] * 500)
    assert len(found.twin) == len(compared) == 499


@given(st.lists(st.text(max_size=30), min_size=1, max_size=8), st.integers(1, 9))
def test_hashes_stand_for_shingles(texts, size):
    hashes, ends = shingle_hashes(texts, size)
    starts = [0, *ends[:-1]]
    assert ends[-1] == len(hashes)
    shingle_of = {}
    for text, start, end in zip(texts, starts, ends, strict=True):
        own = {folded(text)[i : i + size] for i in range(max(1, len(folded(text)) - size + 1))}
        assert len(set(hashes[start:end].tolist())) == len(own)
        for i, value in enumerate(hashes[start:end].tolist()):
            shingle = folded(text).ljust(size, "\0")[i : i + size]
            assert shingle_of.setdefault(value, shingle) == shingle


def test_typographic_signs_hide_no_duplicate():
    plain = "I can't sleep, I won't eat... it's all \"fine\" - so they say. I don't know; I'm tired - I'd like to talk, but who's there?"
    typed = (
        plain.replace("'", "\u2019").replace(' "', " \u201c").replace('" ', "\u201d ").replace(" - ", " \u2013 ").replace("...", "\u2026")
    )
    wide = "".join(chr(ord(letter) + 0xFEE0) if letter.isalpha() else letter for letter in plain)
    assert find([plain, typed, wide, typed.upper()]).twin == {1: (0, 1.0), 2: (0, 1.0), 3: (0, 1.0)}


def test_several_processes_give_the_same_sketches(monkeypatch):
    texts = variants(100, 5)
    one = near_duplicates.sketch(texts, 8, 64, 3)
    monkeypatch.setattr(near_duplicates, "CHUNK", 16)
    monkeypatch.setattr(near_duplicates, "PARALLEL", 1)
    assert (near_duplicates.sketch(texts, 8, 64, 3) == one).all()
    assert one.shape == (100, 64)


def test_nothing_and_next_to_nothing():
    assert find([]) == NearDuplicates({}, {})
    assert find(["", "a", "A", "b"]).twin == {2: (1, 1.0)}
    assert matches_between([], ["a"], above=0.5, shingle_chars=8, permutations=16, seed=1) == []
    assert matches_between(["a"], [], above=0.5, shingle_chars=8, permutations=16, seed=1) == []


@pytest.mark.parametrize("seed", range(3))
def test_matches_between_two_sets(seed):
    texts = variants(120, seed)
    mine, others = texts[:60], texts[60:]
    found = matches_between(mine, others, above=0.2, shingle_chars=8, permutations=128, seed=7)
    wanted = [(i, j, similarity(text, other, 8)) for j, other in enumerate(others) for i, text in enumerate(mine)]
    assert found == [(i, j, value) for i, j, value in wanted if value > 0.2]
    assert len(found) > 5


def test_the_benchmark_runs():
    command = [sys.executable, "benchmarks/near_duplicates.py", "--sizes", "300", "--rival-up-to", "300"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, ours, rival = done.stdout.splitlines()
    assert [line.split()[1] for line in (ours, rival)] == ["ours", "datasketch"]
    assert ours.split()[5] == rival.split()[5] != "0"


SETTINGS = SelectSettings(
    min_chars=20, max_chars=60, seed=5, near_duplicates={"drop_above": 0.85, "cluster_above": 0.6, "shingle_chars": 4, "permutations": 128}
)


def rows(*texts, source="a"):
    return [{"source": source, "source_row": n, "source_key": None, "text": text, "topic_label": None} for n, text in enumerate(texts, 1)]


def run_select(tmp_path, monkeypatch, settings, **sources):
    paths = []
    for name, records in sources.items():
        paths.append(str(tmp_path / f"{name}.jsonl"))
        dump_records(tmp_path / f"{name}.jsonl", records, "source_row")
    words = ["--settings", settings.model_dump_json(), "--out", str(tmp_path / "out.jsonl"), "--dropped", str(tmp_path / "dropped.jsonl")]
    monkeypatch.setattr("sys.argv", ["scripts/select_speeches.py", "--sources", *paths, *words])
    main()
    return read_records(tmp_path / "out.jsonl", "unique_speech"), read_records(tmp_path / "dropped.jsonl", "dropped_row")


def test_every_row_is_kept_or_dropped_with_its_reason(tmp_path, monkeypatch):
    first = "I cannot sleep since my father died in May"
    kept, dropped = run_select(
        tmp_path, monkeypatch, SETTINGS,
        a=rows("too short", f"<p>{first}</p>", "x" * 61, "My sister does not speak to me any more"),
        b=rows(first.replace(" ", "\u00a0"), first + "!", source="b"),
    )  # fmt: skip
    assert {(row["source"], row["source_row"]) for row in kept} == {("a", 2), ("a", 4)}
    assert [(row["source"], row["source_row"], row["reason"]) for row in dropped] == [
        ("a", 1, "too short"), ("a", 3, "too long"), ("b", 1, "exact duplicate"), ("b", 2, "near duplicate"),
    ]  # fmt: skip
    assert dropped[0]["detail"] == "9 characters"
    assert dropped[2]["detail"] == speech_id(first)
    assert dropped[3]["detail"].startswith(speech_id(first))


def test_clusters_are_named_by_their_smallest_id(tmp_path, monkeypatch):
    texts = variants(60, 9)
    wide = SETTINGS.model_copy(update={"max_chars": 1000})
    kept, _ = run_select(tmp_path, monkeypatch, wide, a=rows(*texts))
    clusters = {row["cluster_id"]: [r["speech_id"] for r in kept if r["cluster_id"] == row["cluster_id"]] for row in kept}
    assert all(cluster == min(members) for cluster, members in clusters.items())
    assert len(clusters) < len(kept)


@given(st.integers(1, 30), st.randoms())
@settings(max_examples=20)
def test_limit_is_a_stable_subset(limit, rng):
    speeches = [{"speech_id": f"{n:016x}", "source": "a", "source_row": n} for n in range(1, 26)]
    dropped: list = []
    kept = drop_over_limit(speeches, SETTINGS.model_copy(update={"limit": limit}), dropped)
    assert len(kept) == min(limit, 25)
    assert len(kept) + len(dropped) == 25
    rng.shuffle(speeches)
    again = drop_over_limit(speeches, SETTINGS.model_copy(update={"limit": limit}), [])
    assert {s["speech_id"] for s in kept} == {s["speech_id"] for s in again}
    more = drop_over_limit(speeches, SETTINGS.model_copy(update={"limit": limit + 1}), [])
    assert {s["speech_id"] for s in kept} <= {s["speech_id"] for s in more}


def test_length_is_of_the_normalised_text():
    dropped: list = []
    speech = {"speech_id": "0" * 16, "source": "a", "source_row": 1}
    kept = drop_by_length([{**speech, "text": "x" * n} for n in (19, 20, 60, 61)], SETTINGS, dropped)
    assert [len(s["text"]) for s in kept] == [20, 60]
    assert Counter(row["reason"] for row in dropped) == {"too short": 1, "too long": 1}


def test_nothing_left_is_an_error(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_select(tmp_path, monkeypatch, SETTINGS, a=rows("short", "also short"))
    assert "'too short': 2" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_wrong_order_of_thresholds(tmp_path, monkeypatch, capsys):
    near = {"drop_above": 0.5, "cluster_above": 0.6, "shingle_chars": 4, "permutations": 128}
    wrong = SETTINGS.model_copy(update={"near_duplicates": SETTINGS.near_duplicates.model_copy(update=near)})
    with pytest.raises(SystemExit):
        run_select(tmp_path, monkeypatch, wrong, a=rows("x" * 30))
    assert "cluster_above is greater than drop_above" in capsys.readouterr().err


def test_counsel_chat(tmp_path, monkeypatch, source_cache):
    from psychocounsel.adapters import read_speeches

    path = source_cache / "counsel-chat" / "20200325_counsel_chat.csv"
    records = [
        {"source": "counsel-chat", "source_row": s.row, "source_key": s.key, "text": s.text, "topic_label": s.topic}
        for s in read_speeches(path, "counsel_chat")
    ]
    near = {"drop_above": 0.85, "cluster_above": 0.6, "shingle_chars": 8, "permutations": 128}
    paper = SelectSettings(min_chars=100, max_chars=1000, near_duplicates=near, seed=1)
    kept, dropped = run_select(tmp_path, monkeypatch, paper, a=records)
    assert (len(records), len({r["text"] for r in records}), len(kept)) == (2129, 824, 710)
    assert len(kept) + len(dropped) == len(records)
    assert len({row["topic_label"] for row in records}) == 31
