"""Tables: what readers and machines see of a cell, escaping, footnotes, and the paper's rows beside or apart from ours."""

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from make_tables import (
    TOPIC_FROM,
    ablation_table,
    all_tables,
    dataset_table,
    index_win_rates,
    pool_table,
    reward_model_table,
    sort_metrics,
    topic_table,
)
from psychocounsel import tables
from psychocounsel.errors import UserError
from psychocounsel.policy_tables import length_table, win_rate_table
from psychocounsel.pool import Pool
from psychocounsel.table_settings import TableSettings
from psychocounsel.tables import FORMATS, ORIENTATION, Missing, Number, Row, Table

PAPER = yaml.safe_load(Path("config/paper.yaml").read_text(encoding="utf-8"))
TAXONOMY = yaml.safe_load(Path("config/taxonomy.yaml").read_text(encoding="utf-8"))["coarse"]
TOPICS = {name: entry["title"] for name, entry in TAXONOMY.items()}
TEXTS = st.text(st.sampled_from("ab \\&%$#_{}~^<>|[]\n\"',;é≥"), max_size=20)


def unescape_latex(text: str) -> str:
    """Undo escape_latex by the longest matches, an implementation of its own."""
    back = {escaped: chr(character) for character, escaped in tables.LATEX.items()}
    return re.sub("|".join(map(re.escape, sorted(back, key=len, reverse=True))), lambda match: back[match[0]], text)


@given(TEXTS)
def test_latex_escaping_loses_nothing_and_leaves_nothing_special(text):
    escaped = tables.escape_latex(text)
    assert unescape_latex(escaped) == text
    bare = re.sub(
        r"\\newline |\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar)\{\}|\\[&%$#_{}]|\$\\[gl]eq\$|\{[\[\]]\}",
        "",
        escaped,
    )
    assert not set(bare) & set("\\&%$#_{}~^<>|[]")


def table(cells: list, **changes) -> Table:
    """A table of one row."""
    facts = {"name": "t", "title": "A title", "columns": [f"c{i}" for i in range(len(cells))], "groups": [("", [Row(cells)])], "notes": []}
    return Table(**{**facts, **changes})


class Cells(HTMLParser):
    """The texts of a table's cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        """Start a cell."""
        assert tag in ("figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td", "p", "sup", "br", "small")
        if tag == "td":
            self.inside = True
            self.found.append("")

    def handle_endtag(self, tag):
        """End a cell."""
        self.inside = self.inside and tag != "td"

    def handle_data(self, data):
        """Collect a cell's text."""
        if self.inside:
            self.found[-1] += data


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_any_text_survives_csv_html_and_keeps_its_markdown_cell(texts):
    made = table(texts)
    assert next(csv.DictReader(io.StringIO(tables.to_csv(made))))["c0"] == texts[0]
    assert Cells(tables.to_html(made)).found == texts
    row = tables.to_markdown(made).split("\n\n")[1].splitlines()[2]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) >= 1
    assert len(tables.to_markdown(made).split("\n\n")[1].splitlines()) == 3


def test_a_pipe_does_not_split_a_markdown_cell():
    assert r"a\|b" in tables.to_markdown(table(["a|b", "c"]))


@given(st.lists(st.lists(TEXTS, min_size=3, max_size=3), min_size=1, max_size=4), st.sampled_from(["", "Mental Issues & more of them"]))
def test_latex_is_whole_whatever_the_texts(texts, group):
    """Environments and braces are closed, every row has its cells, and a cell of several lines stands in a column that can break."""
    made = table([], columns=["A column & its long head", "b", "c"], groups=[(group, [Row(row, ["A note_"]) for row in texts])])
    latex = tables.to_latex(made)
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end){(\w+)}", latex):
        assert kind == "begin" or opened.pop() == name
        opened += [name] * (kind == "begin")
    assert not opened
    assert latex.count(r"\begingroup") == latex.count(r"\endgroup")
    bare = re.sub(r"\\[{}&]", "", latex)
    assert bare.count("{") == bare.count("}")
    body = bare[bare.index(r"\toprule") : bare.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.rstrip().endswith((r"\\", r"\addlinespace")) and "multicolumn" not in line]
    assert len(rows) == 1 + len(texts)
    assert {row.count("&") for row in rows} == {2}
    assert (r"\newline" in body) <= ("longtable" in latex)


def test_long_heads_are_stacked_and_repeated_labels_left_out():
    rows = [Row([name, Number(1)]) for name in ("Llama", "Llama", "Gemma")]
    latex = tables.to_latex(table([], columns=["Policy", "Emotional Well-being"], groups=[("", rows)]))
    assert r"\shortstack[r]{Emotional \\ Well-being}" in latex
    assert [line.split(" & ")[0] for line in latex.splitlines() if line.endswith(r"1.000 \\")] == ["Llama", "", "Gemma"]


def test_numbers_are_rounded_for_readers_and_whole_for_machines():
    made = table([Number(0.98765, 3, 0.97, 0.99), Number(1234.0, 0)])
    assert "0.988 [0.970, 0.990]" in tables.to_markdown(made)
    assert "1,234" in tables.to_markdown(made)
    assert next(csv.DictReader(io.StringIO(tables.to_csv(made)))) == {
        "group": "",
        "c0": "0.98765",
        "c0 low": "0.97000",
        "c0 high": "0.99000",
        "c1": "1234",
        "notes": "",
    }


def test_what_rounds_to_nothing_has_no_sign():
    made = table([Number(-0.000001, 3, -0.0000001, 0.0)])
    assert "0.000 [0.000, 0.000]" in tables.to_markdown(made)
    assert "-" not in tables.to_csv(made).split("\n")[1]


@pytest.mark.parametrize("render", FORMATS.values())
def test_every_missing_cell_has_a_footnote_and_equal_reasons_share_one(render):
    rows = [Row(["x", Missing("Reason one."), Missing("Reason two.")]), Row(["y", Missing("Reason two."), Number(1)], ["A note."])]
    text = render(table(["", "", ""], groups=[("", rows)]))
    assert text.count("n/a") == 3
    assert all(reason in text for reason in ("Reason one.", "Reason two.", "A note."))
    if render is not tables.to_csv:
        assert text.count("Reason two.") == 1


def test_footnote_marks_go_on_after_z():
    assert [tables.letter(i) for i in (0, 25, 26, 27, 52)] == ["a", "z", "aa", "ab", "ba"]


def test_undefined_estimates_are_missing():
    assert tables.number(None, "why") == Missing("why")
    assert tables.number({"value": None, "low": None, "high": None}, "why") == Missing("why")


ESTIMATE = {"value": 0.8, "low": 0.7, "high": 0.9}


def metrics(name: str, **changes) -> dict:
    """A metrics result."""
    facts = {"name": name, "pairs": 10, "n": 9, "kind": "reward_model", "speeches": 9, "accuracy": ESTIMATE, "at_chance": False, "ties": 0}
    estimates = dict.fromkeys(("accuracy_ties_half", "auc", "ece", "brier", "nll"), ESTIMATE)
    return {**facts, **estimates, "temperature": 1.5, "orders": None, "sections": None, **changes}


def settings(**changes) -> TableSettings:
    """Settings of make_tables."""
    return TableSettings(**{"opponent": "GPT-4o", "judge": "GPT-4o", **changes})


def cells(made: Table, first: str, source: str) -> list:
    """The cells of the row with these first cell and source."""
    return next(row.cells for _, row in made.rows() if row.cells[0] == first and source in row.cells[:3])


def test_papers_row_stands_under_the_row_of_its_model_and_nowhere_else():
    groups = [{"title": "Ours", "models": ["ours-8b", "other"]}]
    mapped = {"reward_models": {"ours-8b": "PsychoCounsel-Llama3-8B-Reward"}}
    made = reward_model_table(
        {"ours-8b": metrics("ours-8b")}, PAPER, settings(reward_models=groups, reported=mapped, titles={"ours-8b": "Ours 8B"})
    )
    order = [(group, row.cells[0], row.cells[1]) for group, row in made.rows()]
    assert order[:3] == [("Ours", "Ours 8B", "this run"), ("Ours", "Ours 8B", "paper"), ("Ours", "other", "this run")]
    apart = [name for group, name, _ in order if group == ORIENTATION]
    assert set(apart) == PAPER["reward_models"].keys() - {"PsychoCounsel-Llama3-8B-Reward"}
    assert cells(made, "Ours 8B", "paper")[2] == Number(97.8, 1)
    assert all(isinstance(cell, Missing) for cell in cells(made, "other", "this run")[2:])


def test_without_a_mapping_all_of_the_papers_rows_stand_apart():
    made = reward_model_table({"m": metrics("m")}, PAPER, settings(reward_models=[{"title": "Ours", "models": ["m"]}]))
    assert [group for group, row in made.rows() if row.cells[1] == "paper"] == [ORIENTATION] * len(PAPER["reward_models"])


def test_a_row_that_the_paper_does_not_have_is_refused():
    options = settings(reward_models=[{"title": "Ours", "models": ["m"]}], reported={"reward_models": {"m": "Skywork"}})
    with pytest.raises(UserError, match="no row 'Skywork'"):
        reward_model_table({}, PAPER, options)


def test_chance_position_bias_and_missing_calibration_are_told():
    ranker = metrics("r", kind="ranker", auc=None, ece=None, brier=None, nll=None, temperature=None, at_chance=True)
    ranker["orders"] = {"consistent_right": ESTIMATE, "first_share": {"value": 0.61, "low": 0.5, "high": 0.7}}
    made = reward_model_table({"r": ranker}, PAPER, settings(reward_models=[{"title": "Rankers", "models": ["r"]}]))
    text = tables.to_markdown(made)
    assert "Not shown to rank better than chance" in text
    assert cells(made, "r", "this run")[8:10] == [Number(80, 1, 70, 90), Number(61, 1, 50, 70)]
    assert "50 means no position bias" in text
    assert "A ranker gives no probability." in text


def test_a_reward_model_at_chance_is_flagged_in_every_table_that_it_bears_on():
    options = settings(
        reward_models=[{"title": "Ours", "models": ["coin"]}],
        ablation=[{"model": "coin", "base": "B", "data": "D"}],
        policies=["iterated", "offline"],
        ranked_by={"iterated": "coin"},
        titles={"coin": "Coin"},
        reported={"policies": {"iterated": "Llama3-3B"}},
    )
    rates = [win_rates(policy, setting) for policy in options.policies for setting in ("free", "length")]
    made = all_tables([], [], [], [], [], [], [], [metrics("coin", at_chance=True)], rates, [], [], [], [], TAXONOMY, PAPER, options)
    flagged = {(table.name, row.cells[0]) for table in made for _, row in table.rows() if any("better than chance" in n for n in row.notes)}
    assert flagged == {("reward_models", "Coin"), ("reward_ablation", "B"), ("win_rates", "iterated"), ("lengths", "iterated")}
    rows = [row for table in made for _, row in table.rows() if table.name == "win_rates" and row.cells[0] == "iterated"]
    assert [bool(row.notes) for row in rows if row.cells[1] == "paper"] == [False, False], "the paper's figures are not ours"


def test_benchmark_results_are_told_apart_from_test_results():
    sections = {"scores": {"Chat": 0.8}, "overall": ESTIMATE, "subsets": {}, "missing": ["hep-go"]}
    test, benchmark = sort_metrics([metrics("m"), metrics("m", sections=sections)])
    rows = [{"model": "m", "base": "B", "data": "D"}, {"model": "n", "base": "B", "data": "E"}]
    made = ablation_table(test, benchmark, ["Chat", "Safety"], PAPER["reward_ablation"], settings(ablation=rows))
    assert made.columns[-3:] == ["RewardBench (%)", "Chat (%)", "Safety (%)"]
    nothing = Missing("No subset of this section had a pair.")
    assert cells(made, "B", "this run")[-3:] == [Number(80, 1, 70, 90), Number(80, 1), nothing]
    assert "without the subsets that had no pair: hep-go" in tables.to_markdown(made)
    with pytest.raises(UserError, match="two files"):
        sort_metrics([metrics("m"), metrics("m")])


def win_rates(policy: str, setting: str) -> dict:
    """A win-rate result with one coarse topic."""
    rate = {"win_rate": 0.6, "n": 10, "low": 0.4, "high": 0.8}
    protocol = {"overall": rate, "topics": {"social_issues": rate}}
    return {
        "policy": policy,
        "opponent": "o",
        "setting": setting,
        "judge": "j",
        "protocol": "together",
        "protocols": {"paper": protocol, "robust": protocol},
        "principles": None,
        "orders": {"agreement": 0.9, "first_share": 0.55},
        "length_controlled": {"win_rate": None, "low": None, "high": None, "coefficient": None, "extrapolated": True, "reason": "every x"},
        "lengths": {"policy_words": 200.0, "opponent_words": 150.0, "cut_off": None, "constraint": None},
    }


def test_win_rates_in_both_settings_and_protocols_beside_the_papers():
    results = index_win_rates([win_rates("p", "free")])
    options = settings(policies=["p"], reported={"policies": {"p": "Llama3-8B+DPO-Iter"}})
    made = win_rate_table(results, [], TOPICS, PAPER["win_rates"], options)
    free = [row.cells for group, row in made.rows() if group == "Without a length constraint"]
    assert [row[1] for row in free] == ["one order", "both orders", "paper"]
    social = 2 + list(TAXONOMY).index("social_issues")
    assert [row[social] for row in free] == [Number(60, 1, 40, 80, False), Number(60, 1, 40, 80, False), Number(91.4, 1)]
    assert isinstance(free[0][2], Missing)
    assert free[2][-2] == Number(87.0, 1)
    length = [row.cells for group, row in made.rows() if group == "With a length constraint"]
    assert length[0][2] == Missing("Not judged in this run.")
    with pytest.raises(UserError, match="same policy"):
        index_win_rates([win_rates("p", "free")] * 2)


def test_length_table_gives_the_reason_for_a_missing_rate():
    text = tables.to_markdown(length_table(index_win_rates([win_rates("p", "free")]), settings(policies=["p"])))
    assert "Every x." in text
    assert "No length was asked for." in text
    assert "xtrapolated" not in text


def test_tables_of_a_run_that_starts_at_pairs_say_so():
    pair = {"speech_id": "s", "split": "train", "chosen_model": "a", "rejected_model": "b"}
    for made in (dataset_table([], [], {}, [], [pair], PAPER["dataset"], settings()), topic_table([], TAXONOMY, settings())):
        assert "This run starts at pairs" in tables.to_csv(made)
    pool = pool_table(Pool([], [pair], {"s": "train"}, ["a"], 10, 1), settings(pool=[{"title": "g", "models": ["a"]}]))
    assert cells(pool, "a", "a")[3] == Number(1, 0)


def test_responses_left_out_are_counted_by_reason():
    left_out = {"no usable answer of the model": 3, "not rated": 0, "some principles not rated": 2}
    made = dataset_table([], [], left_out, [], [], PAPER["dataset"], settings())
    shown = {row.cells[0]: row.cells[1].value for group, row in made.rows() if group == "Responses left out, by reason"}
    assert shown == {"no usable answer of the model": 3, "some principles not rated": 2}


def test_topics_of_the_paper_add_up():
    made = topic_table([], TAXONOMY, settings())
    by_topic = [row.cells for group, row in made.rows() if group != TOPIC_FROM]
    assert sum(row[-1].value for row in by_topic if row[0] == "All of these") == PAPER["dataset"]["speeches"]["total"]
    assert sum(row[-1].value for row in by_topic if row[0] != "All of these") == PAPER["dataset"]["speeches"]["total"]


def test_it_is_told_where_topics_are_from():
    origins = [("source", "train"), ("source", "test"), ("judge", "train"), ("embedding", "dev")]
    speeches = [{"topic": "anxiety", "topic_from": origin, "split": split} for origin, split in origins]
    rows = [row.cells for group, row in topic_table(speeches, TAXONOMY, settings()).rows() if group == TOPIC_FROM]
    made = {row[0]: [cell.value for cell in row[1:6]] for row in rows}
    assert made == {
        "The source's label": [1, 0, 1, 2, 50], "The judge's choice": [1, 0, 0, 1, 25], "Nearest by embedding": [0, 1, 0, 1, 25],
    }  # fmt: skip


@pytest.mark.parametrize("render", FORMATS.values())
def test_no_cell_is_empty_or_nan_in_any_format(render):
    options = settings(policies=["p"], reward_models=[{"title": "g", "models": ["m"]}], ablation=[{"model": "m", "base": "B", "data": "D"}])
    results = index_win_rates([win_rates("p", "free")])
    for made in (
        reward_model_table({"m": metrics("m", temperature=None)}, PAPER, options),
        ablation_table({}, {}, ["Chat"], PAPER["reward_ablation"], options),
        win_rate_table(results, [], TOPICS, PAPER["win_rates"], options),
        length_table(results, options),
    ):
        assert all(str(cell) for _, row in made.rows() for cell in row.cells)
        assert "nan" not in render(made).lower().replace("finan", "")
