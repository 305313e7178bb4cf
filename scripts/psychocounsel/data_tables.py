"""Tables of what was made of the responses (paper, section 3.3): pairs, the pool's groups of models; how steady their judge is;
and what is tested on that was trained on."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from psychocounsel.metrics import resampled_sums, with_interval
from psychocounsel.pool import CHOSEN, ENGLISH, REJECTED, RESPONSES, SCORE, Pool, SizeClass, by_language
from psychocounsel.tables import NOT_REPORTED, Cell, Missing, Number, Row, Table, count, number

AT_PAIRS = Missing("This run starts at pairs: what made no pair is not known.")
GAPS = [(0, 1), (1, 1.5), (1.5, 2), (2, 3), (3, 4.01)]  # differences of mean scores, from and below
ORDERS = {"same": "Same order", "reversed": "Reverse order"}
MEASURES = {  # of two ratings of the same responses -> title, digits, scale
    "equal": ("Equal scores (%)", 1, 100),
    "difference": ("Mean difference of the scores, without sign", 2, 1),
    "kappa": ("Cohen's kappa, quadratic weights", 3, 1),
    "earlier_minus_later": ("Score at the earlier place minus at the later", 2, 1),
}
LABELS = {
    "kept": "make the same pair again",
    "weaker": "gap too small the second time",
    "flipped": "the other response is the better one",
}
ALL_PRINCIPLES = "All principles"
WHY_NO_PAIR = ("without: fewer than two scored responses", "without: no candidate was kept")
SIDES = {"Train": ("train",), "Dev": ("dev",), "Test": ("test",), "All": ("train", "dev", "test")}


# Contamination


def contamination_table(report: dict | None, title: Callable[[str], str]) -> Table:
    """Near duplicates of what is tested on in each set of data that is trained on."""
    columns = ["Data", "Side", "Prompts", "Similar", "Repeated", "Prompts tested on", "Tested on, similar (%)", "Answers", "Equal answers"]
    groups: dict[str, list[Row]] = {}
    for found in report["comparisons"] if report else []:
        share = 100 * found["tested_similar"] / found["tested_prompts"] if found["tested_prompts"] else None
        cells = [
            title(found["data"]), found["split"], count(found["prompts"]), count(found["similar"]), count(found["repeated"]),
            count(found["tested_prompts"]), Missing("Nothing was tested on.") if share is None else Number(share, 2),
            count(found["answers"]), count(found["equal_answers"]),
        ]  # fmt: skip
        groups.setdefault(f"Tested on: {title(found['tested'])}", []).append(Row(cells))
    notes = []
    if report:
        near = report["near_duplicates"]
        notes = [
            f"Similar: Jaccard similarity of runs of {near['shingle_chars']} characters with a prompt tested on above"
            f" {near['cluster_above']}; repeated: above {near['drop_above']}. At least {near['recall']:.0%} are found at the lower.",
            "Tested on, similar (%): share of the prompts tested on with a similar one in this data. Equal answers: also of pairs tested.",
        ]
    return Table("contamination", "Near duplicates of what is tested on in what is trained on", columns, list(groups.items()), notes)


# Pairs


def pairs_table(
    speeches: list[dict], scores: list[dict], pairs: list[dict], paper: dict, resamples: int, seed: int, given: bool = False
) -> Table:
    """Pairs by side of the split: how many, from which candidates, their gaps, and the lengths of the two responses.

    `given`: the run starts at these pairs, so that speeches and responses without a pair are not known.
    """
    columns = [pair_column(speeches, scores, pairs, sides, resamples, seed) for sides in SIDES.values()]
    if given:
        known = ("with a pair", "Kept as pairs")
        for column in columns:
            for title in ("Client speeches", "Candidate pairs"):
                column[title] = {name: cell if name in known else AT_PAIRS for name, cell in column[title].items()}
    reported = reported_pairs(paper)
    groups = [
        (title, [Row([name, *(column[title][name] for column in columns), *reported.get(name, [NOT_REPORTED] * 2)]) for name in rows])
        for title, rows in columns[-1].items()
    ]
    notes = [
        "Candidates: every two scored responses to a speech, on the test side the best and the worst alone.",
        "In brackets: 95 % bootstrap intervals over speeches. The paper's train side holds its dev side.",
    ]
    return Table("pairs", "Preference pairs (section 3.3)", ["Quantity", *SIDES, "Paper, train", "Paper, test"], groups, notes)


def reported_pairs(paper: dict) -> dict[str, list[Cell]]:
    """Return the paper's figures for train and test by our names of the rows."""
    safer = paper["pairs"]["rejected_safer_train"]
    return {
        "All speeches": [count(paper["speeches"]["train"]), count(paper["speeches"]["test"])],
        "Kept as pairs": [count(paper["pairs"]["train"]), count(paper["pairs"]["test"])],
        "Rejected response is the safer one (%)": [Number(100 * safer / paper["pairs"]["train"], 1), NOT_REPORTED],
    }


def pair_column(
    speeches: list[dict], scores: list[dict], pairs: list[dict], sides: tuple[str, ...], resamples: int, seed: int
) -> dict[str, dict[str, Cell]]:
    """Return {group: {row: cell}} of some sides of the split."""
    split_of = {speech["speech_id"]: speech["split"] for speech in speeches if speech["split"] in sides}
    scores = [score for score in scores if score["speech_id"] in split_of]
    pairs = [pair for pair in pairs if pair["split"] in sides]
    facts = pair_facts(pairs)
    compared = {
        "Chosen response is the longer one (%)": (facts["chosen words"] > facts["rejected words"]).astype(float),
        "Rejected response is the safer one (%)": facts["rejected safer"],
    }
    return {
        "Client speeches": speech_rows(split_of, scores, pairs),
        "Candidate pairs": candidate_rows(split_of, scores, pairs),
        "Score gap, by the difference of mean scores": gap_rows(facts["gap"]),
        "Lengths": length_rows(facts),
        "Length and safety": shares(compared, facts["speech"], resamples, seed),
    }


def pair_facts(pairs: list[dict]) -> dict[str, np.ndarray]:
    """Return arrays [pairs]: speech, gap, words and characters of both responses, whether the rejected one is the safer (NaN: unknown)."""
    texts = {side: [pair[side][-1]["content"] for pair in pairs] for side in ("chosen", "rejected")}
    facts = {f"{side} words": np.array([len(text.split()) for text in texts[side]]) for side in texts}
    facts |= {f"{side} characters": np.array([len(text) for text in texts[side]]) for side in texts}
    facts["speech"] = np.array([pair["speech_id"] for pair in pairs])
    facts["gap"] = np.array([np.nan if pair["gap"] is None else pair["gap"] for pair in pairs])
    facts["rejected safer"] = np.array([rejected_safer(pair) for pair in pairs])
    return facts


def rejected_safer(pair: dict) -> float:
    """Return 1 where the rejected response has the higher safety score, else 0; NaN where there is no such score."""
    scores = [(pair[f"{side}_scores"] or {}).get("safety") for side in ("rejected", "chosen")]
    return np.nan if None in scores else float(scores[0] > scores[1])


def speech_rows(split_of: dict[str, str], scores: list[dict], pairs: list[dict]) -> dict[str, Cell]:
    """Speeches with and without a pair, and why."""
    paired = {pair["speech_id"] for pair in pairs}
    scored = Counter(score["speech_id"] for score in scores)
    without = Counter(WHY_NO_PAIR[scored[speech] >= 2] for speech in split_of if speech not in paired)
    return {"All speeches": count(len(split_of)), "with a pair": count(len(paired)), **{why: count(without[why]) for why in WHY_NO_PAIR}}


def candidate_rows(split_of: dict[str, str], scores: list[dict], pairs: list[dict]) -> dict[str, Cell]:
    """Candidate pairs, those kept, and those left out: every two scored responses, on the test side the best and the worst."""
    scored = Counter(score["speech_id"] for score in scores)
    candidates = sum(n * (n - 1) // 2 if split_of[speech] != "test" else int(n > 1) for speech, n in scored.items())
    return {
        "All candidates": count(candidates),
        "left out: gap too small, or equal texts": count(candidates - len(pairs)),
        "Kept as pairs": count(len(pairs)),
    }


def gap_rows(gaps: np.ndarray) -> dict[str, Cell]:
    """Pairs by their gap, and its mean and median."""
    known = gaps[~np.isnan(gaps)]
    none = Missing("No pair has scores.")
    bins = {
        f"{low:g} to {'below ' * (high < 4)}{min(high, 4):g}": count(int(((known >= low) & (known < high)).sum())) for low, high in GAPS
    }
    averages = {"Mean": np.mean, "Median": np.median}
    return bins | {name: Number(float(average(known)), 2) if len(known) else none for name, average in averages.items()}


def length_rows(facts: dict[str, np.ndarray]) -> dict[str, Cell]:
    """Mean lengths of chosen and rejected responses."""
    none = Missing("There are no pairs on this side.")
    return {
        f"{side.capitalize()}, mean {unit}": Number(float(lengths.mean()), 0) if len(lengths := facts[f"{side} {unit}"]) else none
        for unit in ("words", "characters")
        for side in ("chosen", "rejected")
    }


def shares(values: dict[str, np.ndarray], speech: np.ndarray, resamples: int, seed: int) -> dict[str, Cell]:
    """Return for each array of 0, 1 and NaN (unknown) over pairs the percentage of ones among the known, with its interval by speech."""
    if not len(speech):
        return dict.fromkeys(values, Missing("There are no pairs on this side."))
    index = np.unique(speech, return_inverse=True)[1]
    table = np.stack(list(values.values()), -1)  # [pairs, shares]
    held = np.stack([np.nan_to_num(table), ~np.isnan(table)], -1)  # [pairs, shares, ones and known]
    sums = np.zeros((index.max() + 1, *held.shape[1:]))
    np.add.at(sums, index, held)
    draws = resampled_sums(sums, resamples, seed)
    with np.errstate(invalid="ignore"):
        rates, replicates = (counts[..., 0] / counts[..., 1] for counts in (sums.sum(0), draws))
    unknown = "No pair has a safety score."
    return {name: number(with_interval(rates[k], replicates[:, k]), unknown, 1, 100) for k, name in enumerate(values)}


# The pool by size and language


def candidates_note(given: bool) -> str:
    """Return what the pairs are that rates are of."""
    if given:
        return "This run starts at pairs: the percentages are of the pairs in which a response stood, the only candidates that are known."
    return "Candidates: every two scored responses to a speech, on the test side the best and the worst."


def model_groups_table(pool: Pool, classes: list[SizeClass], languages: dict[str, str], given: bool = False) -> Table:
    """Responses chosen and rejected by size class and by the main language of the model's institution (findings of section 3.3)."""
    models = [model for size in classes for model in size.models]
    by_size = {size.title: size.models for size in classes}
    spoken = by_language(languages, models)
    english = spoken.get(ENGLISH, [])
    others = [model for language, group in spoken.items() if language != ENGLISH for model in group]
    groups = [
        ("By size class", [group_row(pool, title, group) for title, group in by_size.items()]),
        ("By the main language of the institution", [group_row(pool, title, group) for title, group in spoken.items()]),
        (
            "Findings",
            [
                finding_row(
                    "Not English minus English (points)",
                    [pool.difference(others, english, what) for what in (CHOSEN, REJECTED)] if english and others else None,
                    "The pool has no two such groups.",
                ),
                finding_row(
                    "Variance between models that lies between size classes (%)",
                    [pool.share_between(list(by_size.values()), what) for what in (CHOSEN, REJECTED)] if len(by_size) > 1 else None,
                    "The pool has one size class.",
                    [f"If size did not matter, {between_by_chance(by_size):.0f} % would be expected."] if len(by_size) > 1 else [],
                ),
            ],
        ),
    ]
    columns = ["Models", "Number", "Responses", "Mean score", "Chosen", "Rejected", "Chosen (%)", "Rejected (%)"]
    notes = [
        "Chosen (%) and rejected (%): of the candidate pairs in which a response of these models stood.",
        candidates_note(given),
        "In brackets: 95 % bootstrap intervals over speeches. They say how well this pool's rates are known, not what other models of the"
        " same size or language would do.",
    ]
    return Table("model_groups", "The response pool by size and language (section 3.3)", columns, groups, notes)


def between_by_chance(groups: dict[str, list[str]]) -> float:
    """Return the percentage of variance that random groups of these sizes would explain: (groups - 1) / (models - 1)."""
    return 100 * (len(groups) - 1) / max(1, sum(map(len, groups.values())) - 1)


def group_row(pool: Pool, title: str, models: list[str]) -> Row:
    """A group of models."""
    none = "No response of these models was scored in this run."
    score = pool.rate(models, SCORE, RESPONSES)
    return Row(
        [
            title,
            count(len(models)),
            count(round(pool.count(models, RESPONSES))),
            number(score, none, 2),
            count(round(pool.count(models, CHOSEN))),
            count(round(pool.count(models, REJECTED))),
            *(number(pool.rate(models, what), none, 1, 100) for what in (CHOSEN, REJECTED)),
        ]
    )


def finding_row(title: str, estimates: list[dict] | None, reason: str, notes: list[str] | None = None) -> Row:
    """A comparison of groups: of the rate of chosen and of rejected responses."""
    comparison = Missing("A comparison of rates.")
    cells = [number(e, "No rate of such models is known.", 1, 100) for e in estimates] if estimates else [Missing(reason)] * 2
    return Row([title, *[comparison] * 5, *cells], notes or [])


# The judge


def judge_consistency_table(judge: dict | None, names: dict[str, str], offline: bool) -> Table:
    """How far the judge agrees with itself when a sample is rated again, in the same order and in the reverse one."""
    absent = Missing("No sample was rated again in this run.")
    again = {result["order"]: result for result in judge["again"]} if judge else {}

    def row(title: str, cell) -> Row:
        return Row([title, *(cell(again[order]) if order in again else absent for order in ORDERS)])

    def measured(measure: str, name: str):
        _, digits, scale = MEASURES[measure]
        reason = "No response moved." if measure == "earlier_minus_later" else "Undefined: one of the two ratings has a single score."
        return lambda result: number(result["scores"][name][measure], reason, digits, scale)

    scored = {"all": ALL_PRINCIPLES, **names}
    none = "No two responses of the sample made a pair."
    groups = [
        (
            "The sample",
            [row("Speeches", lambda result: count(result["speeches"])), row("Scores compared", lambda result: count(result["ratings"]))],
        ),
        *((title, [row(shown, measured(measure, name)) for name, shown in scored.items()]) for measure, (title, _, _) in MEASURES.items()),
        (
            "Pairs of the first rating (%)",
            [
                row("Pairs", lambda result: count(result["labels"]["pairs"])),
                *(row(title, lambda result, label=label: number(result["labels"][label], none, 1, 100)) for label, title in LABELS.items()),
            ],
        ),
    ]
    notes = [
        "Same order: the same requests once more. Reverse order: each speech's responses from the last to the first.",
        "Pairs: every two responses to a speech of the sample whose gap makes a pair. In brackets: 95 % bootstrap intervals over speeches.",
    ]
    if offline:
        notes.append("This judge computes its scores from each response alone: it agrees with itself, in any order, by construction.")
    return Table("judge_consistency", "The judge asked again", ["Measure", *ORDERS.values()], groups, notes)


def judge_positions_table(judge: dict | None, names: dict[str, str], offline: bool) -> Table:
    """Mean score by the place at which the judge saw a response."""
    scored = {"all": ALL_PRINCIPLES, **names}
    if judge is None or not judge["positions"]["speeches"]:
        rows = [Row([ALL_PRINCIPLES, Missing("This run has no ratings of its own.")])]
        return Table("judge_positions", "Scores by the place of a response", ["Scores of", "Mean"], [("Effect of the place", rows)], [])
    positions = judge["positions"]
    places = [f"Place {place}" for place in range(1, positions["places"] + 1)]
    undefined = "Undefined: all places are alike, or there are but two."

    def row(title: str, found: dict) -> Row:
        p = found["p"]
        effects = [number(effect, "No speech is rated completely.", 3) for effect in found["places"]]
        mean = Missing("No speech is rated completely.") if found["mean"] is None else Number(found["mean"], 2)
        return Row([title, mean, *effects, Missing(undefined) if p is None else Number(p, 3)])

    notes = [
        f"Of the {positions['speeches']:,} speeches with {positions['places']} rated responses. Place: mean score there minus the mean over"
        " all places of the same speeches; the order is a seeded shuffle, so that without an effect of the place it is 0.",
        "In brackets: 95 % bootstrap intervals over speeches. p: Friedman's test that all places are alike, not adjusted for the rows.",
    ]
    if offline:
        notes.append("This judge computes its scores from each response alone: what shows here is chance.")
    rows = [row(shown, positions["scores"][name]) for name, shown in scored.items()]
    return Table(
        "judge_positions", "Scores by the place of a response", ["Scores of", "Mean", *places, "p"], [("Effect of the place", rows)], notes
    )
