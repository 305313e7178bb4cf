"""Rows of the shape of the authors' published data set, made by a seeded generator: no text of it, no word of a client."""

import random
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PRINCIPLES = ("empathy", "relevance", "clarity", "safety", "exploration", "autonomy", "staging")
MODELS = ("meta-llama/Llama-3.1-8B-Instruct", "gemma-2-9b-it", "GPT-4o", "Qwen/Qwen2.5-7B-Instruct", "some-model-that-nobody-knows")
FEELINGS = ("anxious", "tired", "lonely", "angry", "sad", "restless", "ashamed", "worried")
ABOUT = ("my job", "my mother", "a friend of mine", "the exam", "our move", "the new school", "my husband", "the neighbours", "money")
SINCE = ("for weeks", "since last spring", "every evening", "whenever I am alone", "since we talked", "at night")
ANSWERS = (
    "It sounds as if {about} weighs on you, and being {feeling} makes sense. What would you like to be different?",
    "Have you thought about what being {feeling} tells you about {about}? You have come far already.",
    "You should make a plan for {about} and stick to it.",
    "Just stop being {feeling}.",
)
RATINGS = [f"{role}_{name}_rating" for role in ("chosen", "rejected") for name in PRINCIPLES]
SCHEMA = pa.schema(
    [("ID", pa.string()), ("prefID", pa.int64())]
    + [(name, pa.string()) for name in ("question", "chosen", "rejected", "chosen_model", "rejected_model")]
    + [(name, pa.int64()) for name in RATINGS]
)


def rated_responses(rng: random.Random, about: str, feeling: str) -> list[dict]:
    """Return four responses of different models with seven ratings each, the first the best."""
    answers = []
    for level, (text, model) in enumerate(zip(ANSWERS, rng.sample(MODELS, 4), strict=True)):
        scores = {name: max(1, min(5, 5 - level + rng.choice((-1, 0, 0)))) for name in PRINCIPLES}
        answers.append({"text": text.format(about=about, feeling=feeling), "model": model, "scores": scores})
    return answers


def rows_of_speech(rng: random.Random, number: int, best_and_worst: bool) -> list[dict]:
    """Return the rows of one speech: of the test side the best against the worst response, else every two whose gap is at least 1."""
    about, feeling = rng.choice(ABOUT), rng.choice(FEELINGS)
    words = " ".join(rng.sample((*ABOUT, *SINCE, *FEELINGS), 9))
    question = f"I feel {feeling} about {about} {rng.choice(SINCE)}. Number {number} on my list: {words}. What can I do?"
    answers = sorted(rated_responses(rng, about, feeling), key=lambda answer: -sum(answer["scores"].values()))
    pairs = [(answers[0], answers[-1])] if best_and_worst else list(combinations(answers, 2))
    rows = []
    for better, worse in pairs:
        if sum(better["scores"].values()) - sum(worse["scores"].values()) >= 7:
            roles = (("chosen", better), ("rejected", worse))
            ratings = {f"{role}_{name}_rating": answer["scores"][name] for role, answer in roles for name in PRINCIPLES}
            texts = {role: answer["text"] for role, answer in roles} | {f"{role}_model": answer["model"] for role, answer in roles}
            rows.append({"ID": f"s{number}", "prefID": len(rows), "question": question, **texts, **ratings})
    return rows


def published_rows(train: int, test: int, seed: int = 1) -> tuple[list[dict], list[dict]]:
    """Return the rows of so many train and test speeches."""
    rng = random.Random(seed)
    made = [rows_of_speech(rng, number, best_and_worst=number >= train) for number in range(train + test)]
    return [row for rows in made[:train] for row in rows], [row for rows in made[train:] for row in rows]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows as Parquet, in the published types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
    return path
