"""What stands behind the cells of the tables of policies: judgements of their answers against the opponent's.

A function a table: from a cell to its formula in words and the nodes under it. Whatever a table shows is computed again from
single verdicts, by the functions that computed it.
"""

from pathlib import Path

import parse_judgements
from psychocounsel import monitor, winrates
from psychocounsel.agreement import agreement
from psychocounsel.explanation import Node
from psychocounsel.monitor_views import MEASURES, WIN_RATE
from psychocounsel.policy_tables import SETTINGS, SHORT_TOPICS
from psychocounsel.record_lineage import RecordLineage
from psychocounsel.records import read_result
from psychocounsel.table_cells import Cell, named
from psychocounsel.table_settings import TableSettings

PROTOCOLS = {  # sources of a row -> protocol, formula of a win rate
    "one order": ("paper", "100 x share of speeches won in the one order that a seeded coin picks"),
    "both orders": ("robust", "100 x mean over speeches of 1 (won in both orders), 0 (lost in both), 0.5 (they disagree)"),
}
LENGTHS = {  # columns of the table of lengths -> formula
    "Speeches": "number of test speeches that were judged in both orders",
    "Win rate (%)": PROTOCOLS["both orders"][1],
    "At equal length (%)": "100 x sigmoid(a) of the fit log-odds(win) = a + b tanh(d / sd(d)), d their difference in characters",
    "Words": "mean number of words of the policy's answers",
    "Opponent's words": "mean number of words of the opponent's answers",
    "Cut off (%)": "100 x share of the policy's answers that were cut off at max_tokens",
    "Off target (%)": "100 x mean of |words - asked words| / asked words over the policy's answers",
    "Within 10 % (%)": "100 x share of the policy's answers within 10 % of the words that were asked for",
    "Orders agree (%)": "100 x share of speeches judged alike in both orders",
    "First wins (%)": "100 x share of the judge's verdicts that prefer the answer shown first",
}
MONITORED = {  # measures of a checkpoint -> formula, where it is no mean of what stands at each answer
    "preferred": "share of speeches on which the reward model gives the answer more reward than the opponent's; equal rewards count half",
    "kl_per_token": "sum of kl over the answers / sum of their tokens",
}
AGREEMENT = {  # columns of the table of two judges -> where their figure stands in the result, formula
    "Comparisons": (("n",), "number of comparisons that both judges judged in both orders"),
    "Agreement (%)": (("agreement", "value"), "100 x share of comparisons with the same verdict of both judges"),
    "Cohen's kappa": (("kappa", "value"), "1 - share of unlike verdicts / the share expected by chance from each judge's own shares"),
    "Win rate (%)": (("win_rates", 0, "value"), "100 x mean over comparisons of what counts for the policy under the first judge"),
    "Win rate, second (%)": (("win_rates", 1, "value"), "the same under the second judge"),
    "Difference": (("difference", "value"), "100 x (win rate under the second judge - win rate under the first)"),
}

Judged = tuple[str, winrates.Verdicts, list[dict]]  # file of judgements, verdicts of the speeches judged in both orders, all rows


def under_win_rates(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Judgements of a policy's answers against the opponent's."""
    topic = topic_of(cell, run)
    if cell.row["Source"] == "this run":
        on_topic = run.counted(cell.path, "speech", lambda row: row["split"] == "test" and topic in (None, row["coarse_topic"]))
        return "number of test speeches", on_topic
    protocol, formula = PROTOCOLS[cell.row["Source"]]
    if cell.base == "Speeches":
        formula = "number of test speeches that were judged in both orders"
    return formula, win_rate(cell, run, named(cell.name, settings.policies, settings), setting_of(cell), protocol, topic)


def under_lengths(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Answers and judgements behind the win rates."""
    policy = named(cell.name, settings.policies, settings)
    return LENGTHS[cell.base], win_rate(cell, run, policy, setting_of(cell), "robust", None)


def under_monitor(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """A checkpoint's assessment, computed again from what each answer measures, or its win rate."""
    policy = named(cell.group, settings.monitored, settings)
    for path in run.inputs(cell.path, "assessment"):
        result = read_result(Path(path), "assessment")
        if (result["policy"], str(result["checkpoint"])) == (policy, cell.name):
            break
    if cell.base == "Step":
        return "optimizer steps since the base, through all rounds of training", [Node(f"step {result['step']}", path)]
    if cell.base == WIN_RATE:
        return PROTOCOLS["both orders"][1], win_rate(cell, run, result["name"], "free", "robust", None)
    name, factor = next((name, factor) for column, name, _, factor in MEASURES if column == cell.base)
    made_with = run.record(path)["identity"]["settings"]
    again = monitor.summarise(result["answers"], made_with["bootstrap"], made_with["seed"])
    stored = result["measures"]
    what = f"{name} of {result['name']}: {stored[name]['value']:.5f}; again from {result['n']} answers: {again[name]['value']:.5f}"
    node = Node(what, path, agrees=again[name] == stored[name])
    for answer in run.few(result["answers"]):
        measures = ", ".join(f"{key} {value:.4g}" for key, value in answer.items() if not key.endswith("_id"))
        under = Node(f"answer to speech {answer['speech_id']}: {measures}", path)
        for place in run.find(run.inputs(path, "response"), "response_id", answer["response_id"]):
            under.under.append(run.response(*place))
        node.under.append(under)
    node.more = result["n"] - len(node.under)
    formula = MONITORED.get(name, "mean over the answers")
    return f"{factor} x {formula}" if factor > 1 else formula, [node]


def win_rate(cell: Cell, run: RecordLineage, policy: str, setting: str, protocol: str, topic: str | None) -> list[Node]:
    """A policy's win rate, computed again from the judgements."""
    if (found := win_rate_file(cell, run, policy, setting)) is None:
        return []
    path, result = found
    made_with, topics = run.record(path)["identity"]["settings"], topics_of_speeches(run, path)
    ((file, verdicts, _),) = judged_under(run, path).values()
    scores = winrates.protocols(made_with["seed"])[protocol](verdicts)
    again = winrates.win_rates(scores, topics, made_with["bootstrap"], made_with["seed"])
    counting = [speech for speech in verdicts if topic in (None, topics[speech])]
    stored, new = rate(result["protocols"][protocol], topic), rate(again, topic)
    if stored is None:
        return [Node("no test speech on this topic was judged", path)]
    what = f"win rate of {policy}: {stored['win_rate']:.5f}; again from {2 * len(counting)} judgements of {len(counting)} speeches"
    node = Node(f"{what}: {new['win_rate']:.5f}" if new else what, path, agrees=stored == new)
    coin = made_with["seed"] if protocol == "paper" else None
    node.under = [comparison(run, file, speech, scores[speech], coin) for speech in run.few(counting)]
    node.more = len(counting) - len(node.under)
    return [node]


def under_principles(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Verdicts on one principle."""
    formula = "number of test speeches that were judged in both orders"
    names = {title: principle for principle, title in settings.ratings.principles}
    if principle := names.get(cell.base):
        formula = "100 x mean over speeches of 1 (won on this principle in both orders), 0 (lost in both), 0.5 (they disagree)"
    policy, setting = named(cell.name, settings.policies, settings), setting_of(cell)
    if (found := win_rate_file(cell, run, policy, setting)) is None:
        return formula, []
    path, result = found
    made_with = run.record(path)["identity"]["settings"]
    ((file, verdicts, rows),) = judged_under(run, path).values()
    again = winrates.principle_rates(rows, verdicts, topics_of_speeches(run, path), made_with["bootstrap"], made_with["seed"])
    stored, new = (rates and rates.get(principle or min(rates)) for rates in (result["principles"], again))
    what = f"win rate of {policy}: {stored['win_rate']:.5f}; again from {len(rows)} judgements"
    node = Node(f"{what}: {new['win_rate']:.5f}" if new else what, path, agrees=stored == new)
    scores = winrates.robust_scores(verdicts)
    node.under = [comparison(run, file, speech, scores[speech], None) for speech in run.few(list(verdicts))]
    node.more = len(verdicts) - len(node.under)
    return formula, [node]


def under_differences(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Judgements of two policies on the same speeches."""
    protocol, formula = PROTOCOLS[cell.row["Source"]]
    formula = f"the first policy's minus the second's, over the speeches judged for both: {formula}"
    if cell.base == "Speeches":
        formula = "number of test speeches that were judged in both orders for both policies"
    ((path, result),) = ((path, read_result(Path(path), "differences")) for path in run.inputs(cell.path, "differences"))
    titles = cell.name.split(" minus ")
    policy, other = (named(title, settings.policies, settings) for title in titles)
    pair = next(p for p in result["differences"] if (p["policy"], p["other"], p["setting"]) == (policy, other, setting_of(cell)))
    made_with, topics, topic = run.record(path)["identity"]["settings"], topics_of_speeches(run, path), topic_of(cell, run)
    judged = judged_under(run, path)
    files = {name: judged[result["judge"], name, pair["setting"]] for name in (policy, other)}
    scores = {name: winrates.protocols(made_with["seed"])[protocol](verdicts) for name, (_, verdicts, _) in files.items()}
    again = winrates.win_rate_differences(scores[policy], scores[other], topics, made_with["bootstrap"], made_with["seed"])
    counting = [s for s in sorted(scores[policy].keys() & scores[other].keys()) if topic in (None, topics[s])]
    stored, new = rate(pair["protocols"][protocol], topic), rate(again, topic)
    if stored is None:
        return formula, [Node("no test speech on this topic was judged for both", path)]
    what = f"difference of {policy} and {other}: {stored['difference']:.5f}; again from the judgements of {len(counting)} speeches"
    node = Node(f"{what}: {new['difference']:.5f}" if new else what, path, agrees=stored == new)
    coin = made_with["seed"] if protocol == "paper" else None
    for speech in run.few(counting):
        under = [named_comparison(name, comparison(run, files[name][0], speech, scores[name][speech], coin)) for name in files]
        node.under.append(Node(f"speech {speech}: {scores[policy][speech] - scores[other][speech]:+g}", under=under))
    node.more = len(counting) - len(node.under)
    return formula, [node]


def under_agreement(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Judgements of two judges on the same answers."""
    protocol, _ = PROTOCOLS[cell.row["Source"]]
    keys, formula = AGREEMENT[cell.base]
    ((path, result),) = ((path, read_result(Path(path), "agreement")) for path in run.inputs(cell.path, "agreement"))
    setting, policy = setting_of(cell), None if cell.name == "All policies" else named(cell.name, settings.policies, settings)
    stored = next(row for row in result["agreement"] if (row["policy"], row["setting"]) == (policy, setting))["protocols"][protocol]
    made_with, judged = run.record(path)["identity"]["settings"], judged_under(run, path)
    score, verdicts, compared = winrates.protocols(made_with["seed"])[protocol], [], []
    for name in sorted({name for _, name, of in judged if of == setting and policy in (None, name)}):
        files = [judged[judge, name, setting] for judge in result["judges"]]
        one, other = (score(found) for _, found, _ in files)
        for speech in sorted(one.keys() & other.keys()):
            verdicts.append((speech, one[speech], other[speech]))
            compared.append((name, [file for file, _, _ in files]))
    again = agreement(verdicts, made_with["bootstrap"], made_with["seed"])
    old, new = (figure(found, keys) for found in (stored, again))
    what = f"{cell.base}: {'undefined' if old is None else f'{old:.5g}'}; again from {len(verdicts)} comparisons"
    node = Node(what, path, agrees=stored == again)
    coin = made_with["seed"] if protocol == "paper" else None
    for (speech, *points), (name, files) in run.few(list(zip(verdicts, compared, strict=True))):
        judges = zip(result["judges"], files, points, strict=True)
        under = [named_comparison(judge, comparison(run, file, speech, point, coin)) for judge, file, point in judges]
        node.under.append(Node(f"{name} on speech {speech}: {points[0]:g} and {points[1]:g}", under=under))
    node.more = len(verdicts) - len(node.under)
    return formula, [node]


def named_comparison(name: str, node: Node) -> Node:
    """Say whose a comparison is, where several stand together."""
    node.what = f"{name}: {node.what}"
    return node


def figure(found: dict, keys: tuple) -> float | None:
    """Return a figure of a nested result."""
    for key in keys:
        found = found[key]
    return found


def rate(rates: dict, topic: str | None) -> dict | None:
    """Return the rate on a coarse topic, or on all."""
    return rates["topics"].get(topic) if topic else rates["overall"]


def topic_of(cell: Cell, run: RecordLineage) -> str | None:
    """Return the coarse topic that a cell's column is about, or None."""
    coarse = run.flow.study.taxonomy["coarse"]
    return {SHORT_TOPICS.get(name, entry["title"]): name for name, entry in coarse.items()}.get(cell.base)


def setting_of(cell: Cell) -> str:
    """Return the setting that a cell's group is about."""
    return next(name for name, (heading, _) in SETTINGS.items() if heading == cell.group)


def topics_of_speeches(run: RecordLineage, path: str) -> dict[str, str]:
    """Return the coarse topics of the speeches that a result was made from."""
    (file,) = run.inputs(path, "speech")
    return {row["speech_id"]: row["coarse_topic"] for _, row in run.rows(file)}


def win_rate_file(cell: Cell, run: RecordLineage, policy: str, setting: str) -> tuple[str, dict] | None:
    """Return the result of a policy in a setting, under the judge of the cell's table, with its path; None where it was not judged."""
    judge = run.flow.judges_of_answers[cell.table == "win_rates_again"]
    results = ((path, read_result(Path(path), "win_rates")) for path in run.inputs(cell.path, "win_rates"))
    wanted = (judge, policy, setting)
    return next(((path, found) for path, found in results if (found["judge"], found["policy"], found["setting"]) == wanted), None)


def judged_under(run: RecordLineage, path: str) -> dict[tuple[str, str, str], Judged]:
    """Return the judgements that a result was made from, by (judge, policy, setting)."""
    found = {}
    for file in run.inputs(path, "judgement"):
        rows = [row for _, row in run.rows(file)]
        key = (rows[0]["judge"], rows[0]["policy"], rows[0]["setting"])
        found[key] = (file, winrates.judged_twice(winrates.verdicts_by_speech(rows)), rows)
    return found


def comparison(run: RecordLineage, judgement_file: str, speech: str, score: float, coin: int | None) -> Node:
    """One speech: the judgements in both orders with the judge's answers, both answers, the speech; `coin`: seed of the one order taken."""
    node = Node(f"speech {speech} scores {score:g}")
    raw_files = run.inputs(judgement_file, "judgement_answer")
    raw = run.find(raw_files, "speech_id", speech)
    for file, line, row in run.find([judgement_file], "speech_id", speech):
        first = row["policy_first"]
        unused = "" if coin is None or winrates.coin(coin, speech) == first else " (not the coin's order)"
        judgement = Node(f"{row['verdict']}, the policy shown {'first' if first else 'second'}{unused}", file, line, text=row["rationale"])
        answers = [place for place in raw if place[2]["policy_first"] == first]
        for raw_file, raw_line, answer in answers:
            on = f" on {answer['principle']}" if answer["principle"] else ""
            judged = Node(f"raw answer of {answer['judge']}{on}", raw_file, raw_line, answer["request_key"], answer["raw"])
            judged.under = run.journal(answer["request_key"], answer["raw"])
            judgement.under.append(judged)
        if answers:
            verdicts, _ = parse_judgements.read_verdicts([answer for *_, answer in answers])
            judgement.agrees = parse_judgements.judgement(row, verdicts)["verdict"] == row["verdict"]
        node.under.append(judgement)
    for file, line, row in run.find(run.inputs(judgement_file, "response"), "speech_id", speech):
        node.under.append(run.response(file, line, row))
    node.under += [run.speech(file, speech) for file in run.inputs(judgement_file, "speech")]
    return node
