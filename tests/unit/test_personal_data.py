"""What leads to a person is masked, what only looks like it stays, and masking is a fixed point."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from psychocounsel.adapters import read_table
from psychocounsel.personal_data import TOKENS, mask
from psychocounsel.records import dump_records, read_records
from psychocounsel.texts import normalise, speech_id
from select_speeches import main


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jane.o'neil+help@mail.example.co.uk, please.", "Write to [email], please."),
        ("(me@x.com,you@y.org)", "([email],[email])"),
        ("mailto:me@x.com", "mailto:[email]"),
        ("It is on http://example.org/a_(b)?q=1#c.", "It is on [url]."),
        ("See www.example.org/page or example.com!", "See [url] or [url]!"),
        ("Mine is example.co.uk", "Mine is [url]"),
        ("http://user:word@example.org/x", "[url]"),
        ("youtu.be/abc123", "[url]"),
        ("Call 650-253-0000 or (650) 253 0001.", "Call [phone] or [phone]."),
        ("+44 20 7946 0958 is mine", "[phone] is mine"),
        ("650.253.0000Jane", "[phone]Jane"),
    ],
)
def test_masked(text, masked):
    assert mask(text)[0] == masked


@pytest.mark.parametrize(
    "text",
    [
        "I was sad.He left.So I cried.It is him.My life is over.In the end.Be kind.",
        "Call 911 or 988, text HOME to 741741, or 116 123 in Britain.",
        "The lifeline is 1-800-273-8255, or 1-800-SUICIDE.",
        "Born 1987-04-05, married 12/31/1999, apart 2015-2020, at 10:30 on 4/5/2021.",
        "I owe $1,250,000.00 and earn 40000 - 50000 at 32, with 1,000 left.",
        "One of 1 2 3 4 5 6 7 8 9 10, I weigh 120, then 130, 140, 150, 160.",
        "My order is 123456789, e.g. at 5 p.m., i.e. late.",
        "I am @ home, on r/depression, and/or tired...really.",
    ],
)
def test_what_only_looks_like_it_stays(text):
    assert mask(text) == (text, {})


PIECES = st.sampled_from(
    [
        "a@b.com",
        "http://",
        "www.",
        "x.org",
        ".com",
        "//",
        "@",
        ".",
        "650 253 0000",
        "+1",
        "-",
        "/",
        "1",
        "[email]",
        "[url]",
        " ",
        "Jo",
        "&",
        "<b>",
    ]
)


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=8).map("".join)))
@example("650 253 0000650 253 0000")
@example("a@b.com@c.com")
def test_is_a_fixed_point_and_stays_normal(text):
    once, found = mask(normalise(text))
    assert mask(once) == (once, {})
    assert normalise(once) == once
    assert bool(found) == (once != normalise(text))


@given(st.emails(), st.sampled_from(["", "I am ", "mail: ", "(", '"', "a,"]), st.sampled_from(["", " ok", ".", ")", ", you?", "!"]))
def test_no_address_survives(email, before, after):
    masked, found = mask(before + email + after)
    assert "@" not in masked
    assert found["email"] == 1
    assert masked.startswith(before)


@given(
    st.sampled_from(["212", "415", "503", "617", "718", "808"]),
    st.integers(200, 999).filter(lambda n: n % 100 != 11 and n != 555),
    st.integers(0, 9999),
    st.sampled_from(["{}-{}-{}", "({}) {}-{}", "{}.{}.{}", "{} {} {}", "{}{}{}", "+1 {} {} {}", "1-{}-{}-{}"]),
)
def test_no_telephone_number_survives(area, exchange, line, written):
    masked, found = mask(f"Please call {written.format(area, exchange, f'{line:04d}')} at night.")
    assert masked == "Please call [phone] at night."
    assert found == {"phone": 1}


@given(st.text(alphabet=st.characters(exclude_characters="@./:", exclude_categories=["Nd", "No", "Nl", "Cs"]), max_size=200))
def test_text_without_any_is_unchanged(text):
    assert mask(text) == (text, {})


WORDS = "I have not slept well since the move, and nobody at work knows how tired I really am; what would you advise me to do now? "


def select(tmp_path, monkeypatch, texts: list[str], **changes) -> tuple[list[dict], list[dict], dict]:
    """Select speeches; return them, the rows left out, and the record."""
    rows = [
        {"source": "mine", "source_row": n, "source_key": None, "text": text, "topic_label": None} for n, text in enumerate(texts, start=1)
    ]
    dump_records(tmp_path / "rows.jsonl", rows, "source_row")
    near = {"drop_above": 0.85, "cluster_above": 0.6, "shingle_chars": 8, "permutations": 128}
    chosen = {"min_chars": 10, "max_chars": 1000, "near_duplicates": near, "seed": 1} | changes
    words = ["--sources", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--dropped", str(tmp_path / "dropped.jsonl")]
    monkeypatch.setattr("sys.argv", ["scripts/select_speeches.py", *words, "--settings", json.dumps(chosen)])
    main()
    record = json.loads((tmp_path / "out.jsonl.prov.json").read_text())
    return read_records(tmp_path / "out.jsonl", "unique_speech"), read_records(tmp_path / "dropped.jsonl", "dropped_row"), record


def test_ids_lengths_and_duplicates_are_those_of_the_masked_text(tmp_path, monkeypatch):
    texts = ["Mail me: a@b.com", "Mail me: somebody.else@example.org", "Mail x@y.de", WORDS + "http://example.org/" + "x" * 1000]
    kept, dropped, record = select(tmp_path, monkeypatch, texts, min_chars=13)
    assert sorted(speech["text"] for speech in kept) == [WORDS + "[url]", "Mail me: [email]"]
    assert all(speech["speech_id"] == speech_id(speech["text"]) for speech in kept)
    assert [(row["source_row"], row["reason"]) for row in dropped] == [(2, "exact duplicate"), (3, "too short")]
    assert {speech["text"]: speech["masked"] for speech in kept} == {WORDS + "[url]": {"url": 1}, "Mail me: [email]": {"email": 1}}
    assert record["run"]["facts"]["masked"] == {"email": 1, "url": 1}


def test_masking_can_be_switched(tmp_path, monkeypatch):
    texts = [WORDS, "Call me at 650-253-0000, please, mail a@b.com"]
    kept, _, record = select(tmp_path, monkeypatch, texts, personal_data="keep")
    assert {speech["text"] for speech in kept} == {WORDS.strip(), texts[1]}
    assert not [speech for speech in kept if "masked" in speech]
    kept, dropped, _ = select(tmp_path, monkeypatch, texts, personal_data="drop")
    assert [speech["text"] for speech in kept] == [WORDS.strip()]
    assert [(row["reason"], row["detail"]) for row in dropped] == [("personal data", "email: 1, phone: 1")]


def test_real_therapists_answers(source_cache):
    """No question of counsel-chat holds any of the three; its answers do, with hundreds of sentences that have no space between them."""
    rows = read_table(source_cache / "counsel-chat" / "20200325_counsel_chat.csv")
    questions = {normalise(row["questionText"]) for row in rows}
    assert [mask(text)[1] for text in questions if mask(text)[1]] == []
    answers = [normalise(row["answerText"]) for row in rows if row["answerText"]][:400]
    masked = [mask(text) for text in answers]
    assert sum(found.get("url", 0) for _, found in masked) > 10
    for text, _ in masked:
        assert not re.search(r"https?:|www\.\w", text)
        assert set(re.findall(r"\[(?:url|email|phone)\]", text)) <= set(TOKENS.values())
    joined = re.compile(r"\b[a-z]+\.(?:It|In|As|So|My|Is|To|Do|Be)\b")
    assert [len(joined.findall(text)) for text in answers] == [len(joined.findall(text)) for text, _ in masked]
