"""The benchmarks' server gives valid, repeatable answers, with gaps between responses as wide as the paper's."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from fakes.stub_server import RESPONSE_CHARS, StubServer, answer
from openai import OpenAI

from psychocounsel.parsing import parse_better, parse_ratings, parse_topic
from psychocounsel.prompts import render

PRINCIPLES = yaml.safe_load(Path("config/principles.yaml").read_text())
TAXONOMY = yaml.safe_load(Path("config/taxonomy.yaml").read_text())["coarse"]
SPEECH = "I cannot sleep and do not know whom to tell."


def prompt(name: str, **variables) -> str:
    return render(Path(f"config/prompts/{name}.jinja").read_text(), client_speech=SPEECH, **variables)


def responses(speech: int) -> list[str]:
    return [answer(f"model-{(7 * speech + 3 * k) % 20}", f"{SPEECH} {speech}", None) for k in range(4)]


def test_every_kind_of_prompt_has_a_valid_answer():
    four, topics = responses(0), [fine for coarse in TAXONOMY.values() for fine in coarse["fine"]]
    for principle in PRINCIPLES:
        rated = parse_ratings(answer("judge", prompt("rate", responses=four, principle=principle), None), 4)
        assert all(300 < len(rationale) < 500 for _, rationale in rated)
    assert parse_topic(answer("judge", prompt("topic", coarse=TAXONOMY), None), topics)
    verdict, rationale = parse_better(answer("judge", prompt("judge", responses=four[:2], principles=PRINCIPLES), None))
    assert verdict in (1, 2)
    assert rationale
    swapped, none = parse_better(answer("judge", prompt("rank", responses=[four[1], four[0]]), None))
    assert swapped == 3 - verdict, "the verdict follows the response, not its place"
    assert none == ""


def test_a_text_has_the_length_of_published_responses_or_the_one_asked_for():
    assert len(answer("model", prompt("respond"), None)) == RESPONSE_CHARS
    assert len(answer("model", prompt("respond"), 7000)) == 7000
    assert 6500 < len(answer("judge", prompt("rate", responses=responses(1), principle=PRINCIPLES[0]), 7000)) < 7500


def test_as_many_pairs_as_the_paper():
    """34,329 pairs of 23,192 training speeches, 2,324 of 3,291 test speeches (section 3.3)."""
    speeches, every_two, best_against_worst = 300, 0, 0
    for speech in range(speeches):
        four = responses(speech)
        totals = [0] * 4
        for principle in PRINCIPLES:
            for k, (score, _) in enumerate(parse_ratings(answer("judge", prompt("rate", responses=four, principle=principle), None), 4)):
                totals[k] += score
        every_two += sum(abs(a - b) >= 7 for a, b in itertools.combinations(totals, 2))
        best_against_worst += max(totals) - min(totals) >= 7
    assert 1.2 < every_two / speeches < 1.8
    assert 0.6 < best_against_worst / speeches < 0.8


def test_it_serves_the_openai_client_and_counts():
    with StubServer(delay=0.3) as stub, OpenAI(base_url=stub.url, api_key="none") as client, ThreadPoolExecutor(4) as threads:

        def ask(number: int):
            return client.chat.completions.create(model="m", messages=[{"role": "user", "content": f"{number} ü"}])

        texts = [completion.choices[0].message.content for completion in threads.map(ask, range(8))]
        again = ask(3)
        assert len(set(texts)) == 8
        assert again.choices[0].message.content == texts[3]
        assert again.usage.total_tokens > 300
        count = stub.count()
        assert count["requests"] == 9
        assert 1 < count["most_in_flight"] <= 4
