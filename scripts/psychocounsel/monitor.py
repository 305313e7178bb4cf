"""Measures of over-optimisation: what a checkpoint's answers are worth to its reward model, and how far they have gone from the base.

A reward model stands in for the judge. Where a policy is trained against it for too long, the reward goes on rising and the answers
get worse (Gao et al. 2023, arXiv 2210.10760; of direct alignment: Rafailov et al. 2024, arXiv 2406.02900). The paper leaves this to
future work. All measures are means over answers, one a speech, with 95 % bootstrap intervals over speeches.
"""

import numpy as np

from psychocounsel.metrics import bootstrap_weights, estimate, mean

NGRAM = 4  # words


def repetition(text: str, n: int = NGRAM) -> float:
    """Share of a text's n-grams that stood in it before: 1 - distinct n-grams / n-grams (seq-rep-n of Welleck et al. 2020).

    Over lower-case words between white space; a text of fewer than n words has none and repeats nothing.
    """
    words = text.lower().split()
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def preference(reward: float, opponent_reward: float) -> float:
    """Whether a reward model prefers an answer to the opponent's: 1, 0, or one half where it cannot tell."""
    return 0.5 if reward == opponent_reward else float(reward > opponent_reward)


def summarise(answers: list[dict], resamples: int, seed: int) -> dict:
    """Return the mean of each measure over answers (the `answers` of an assessment), each {"value", "low", "high"}.

    `kl_per_token` is a ratio of means: nats of all answers by tokens of all answers.
    """
    answers = sorted(answers, key=lambda row: row["speech_id"])
    weights = bootstrap_weights([row["speech_id"] for row in answers], resamples, seed)
    columns = {name: np.array([float(row[name]) for row in answers]) for name in answers[0] if name not in ("speech_id", "response_id")}
    preferred = np.array([preference(row["reward"], row["opponent_reward"]) for row in answers])
    return {
        **{name: estimate(lambda w, values=values: mean(values, w), weights) for name, values in columns.items()},
        "preferred": estimate(lambda w: mean(preferred, w), weights),
        "kl_per_token": estimate(lambda w: mean(columns["kl"], w) / mean(columns["tokens"], w), weights),
    }
