"""Figures, cards and the report: drawn from records, the same bytes twice, self-contained, and quoting nothing that must not be quoted."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from programs import run_program, start_program

from psychocounsel.costs import cost_table
from psychocounsel.errors import UserError
from psychocounsel.templates import REPORT, duration, interval
from write_report import environment, read_provenance, stage_rows

PRINCIPLES = ["empathy", "relevance", "clarity", "safety", "exploration", "autonomy", "staging"]
COMMON = ["--taxonomy", "config/taxonomy.yaml"]
TEXT = "I <b>feel</b> tired & alone."


def ident(*parts: object) -> str:
    """An id of 16 hex digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def speech(i: int, **changes) -> dict:
    """A speech record."""
    facts = {
        "text": TEXT + " It goes on." * i,
        "source": "open",
        "source_row": i,
        "source_key": None,
        "topic": "anxiety",
        "topic_from": "judge",
    }
    split = {"split": ("test", "train", "dev")[i % 3], "coarse_topic": "core_mental_health_issues"}
    return {"speech_id": ident(i), "cluster_id": ident(i), **facts, **split, **changes}


def records() -> dict[str, list[dict]]:
    """A run of six speeches, two models and two comparisons, all won."""
    speeches = [speech(i) for i in range(6)]
    scores, pairs = [], []
    message = [{"role": "user", "content": "x"}]
    for row in speeches:
        made = []
        for model, score in (("good", 4), ("bad", 2)):
            each = dict.fromkeys(PRINCIPLES, score)
            facts = {"speech_id": row["speech_id"], "model": model, "scores": each, "total": 7 * score, "overall": float(score)}
            made.append({"response_id": ident(row["speech_id"], model), **facts})
        scores += made
        better, worse = made
        texts = dict.fromkeys(("prompt", "chosen", "rejected"), message)
        models = {"chosen_model": "good", "rejected_model": "bad", "chosen_scores": better["scores"], "rejected_scores": worse["scores"]}
        ids = {"pair_id": ident(row["speech_id"], "pair"), "chosen_id": better["response_id"], "rejected_id": worse["response_id"]}
        pairs.append({"speech_id": row["speech_id"], "split": row["split"], "gap": 2.0, "subset": None, **texts, **models, **ids})
    test = [row for row in speeches if row["split"] == "test"]
    compared = {"policy": "p", "opponent": "o", "setting": "length", "judge": "j", "verdict": "win", "rationale": "It <i>explores</i>."}
    compared |= {"protocol": "together", "principles": None}
    answer = {"sample": 0, "finish_reason": "stop", "usage": None, "request_key": "0" * 64, "served_model": None, "target_words": 4}
    return {
        "speeches": speeches,
        "scores": scores,
        "pairs": pairs,
        "judgements": [{"speech_id": row["speech_id"], "policy_first": first, **compared} for row in test for first in (True, False)],
        "answers": [
            {"response_id": ident("p", i), "speech_id": row["speech_id"], "model": "p", "text": f"Policy {i}", **answer}
            for i, row in enumerate(test)
        ],
        "opponent": [
            {"response_id": ident("o", i), "speech_id": row["speech_id"], "model": "o", "text": f"Other {i}", **answer}
            for i, row in enumerate(test)
        ],
    }


def program(name: str, *words: object, how=run_program, **settings) -> subprocess.CompletedProcess:
    """Run a program with settings."""
    return how(name, *words, "--settings", json.dumps(settings))


def succeed(name: str, *words: object, **settings) -> None:
    """Run a program that must end well."""
    done = program(name, *words, **settings)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with records, win rates, tables and figures."""
    folder = tmp_path_factory.mktemp("run")
    for name, rows in records().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "log.json").write_text(json.dumps([{"step": i, "loss": 0.7 - i / 100} for i in range(1, 5)] + [{"step": 4, "accuracy": 1.0}]))
    win_rates = [
        "--speeches",
        folder / "speeches.jsonl",
        "--judgements",
        folder / "judgements.jsonl",
        "--answers",
        folder / "answers.jsonl",
    ]
    succeed(
        "compute_win_rates",
        *win_rates,
        "--opponent",
        folder / "opponent.jsonl",
        "--out",
        folder / "wins.json",
        policy="p",
        setting="length",
        seed=1,
        bootstrap=9,
    )
    inputs = [word for name in ("speeches", "scores", "pairs") for word in (f"--{name}", folder / f"{name}.jsonl")]
    effect = {"value": 0.1, "low": -0.1, "high": 0.3}
    places = {name: {"mean": 3.0, "places": [effect, effect], "p": None} for name in ("all", *PRINCIPLES)}
    judge = {"judge": "j", "positions": {"places": 2, "speeches": 6, "scores": places}, "again": []}
    (folder / "judge.json").write_text(json.dumps(judge))
    inputs += ["--win-rates", folder / "wins.json", "--judge", folder / "judge.json", *COMMON]
    pool = [{"title": "all", "models": ["good", "bad"]}]
    named = {"opponent": "O", "judge": "J", "policies": ["p"], "note": "A demonstration."}
    succeed("make_tables", *inputs, "--paper", "config/paper.yaml", "--out-dir", folder / "tables", pool=pool, **named)
    cases = [word for name in ("speeches", "judgements", "answers", "opponent") for word in (f"--{name}", folder / f"{name}.jsonl")]
    quoting = {"policy": "P", "opponent": "O", "judge": "J", "quotable": ["open"], "crisis_topics": []}
    succeed("choose_cases", *cases, "--out-dir", folder / "tables", **quoting)
    figures = [
        *inputs,
        "--policy-logs",
        f"p={folder / 'log.json'}",
        f"p={folder / 'log.json'}",
        "--reward-logs",
        f"rm={folder / 'log.json'}",
    ]
    for place, how in (("figures", run_program), ("again", start_program)):
        succeed("plot_figures", *figures, "--out-dir", folder / place, pool=pool, how=how, **named)
    return folder


def report_settings(**changes) -> dict:
    """Settings of write_report."""
    facts = {"title": "A run", "labels": "made by J", "judge_of_answers": "J", "opponent": "O", "summary": [["Run", "tiny"]]}
    return {**facts, "note": "A demonstration.", **changes}


def report_inputs(folder: Path) -> list:
    """Arguments of write_report."""
    shown = ["--tables", *sorted(folder.glob("tables/*.html")), "--figures", *sorted(folder.glob("figures/*.svg"))]
    return [*shown, "--run-dir", folder]


def test_figures_are_drawn_and_the_same_bytes_twice(run):
    names = {path.name for path in (run / "figures").iterdir() if not path.name.endswith(".json")}
    drawn = (
        "dataset",
        "pairs",
        "chosen_models",
        "rejected_models",
        "model_groups",
        "judge_positions",
        "win_rates",
        "win_rate_topics",
        "training_reward_models",
        "training_policies",
    )
    assert names == {f"{name}.{ending}" for name in drawn for ending in ("svg", "png")}
    for name in names:
        assert (run / "figures" / name).read_bytes() == (run / "again" / name).read_bytes(), name


@pytest.mark.parametrize("most", [1, 3, 15, 26_483])
def test_an_axis_of_counts_is_marked_at_whole_numbers_as_they_are(most):
    from psychocounsel.plotting import canvas, show_counts

    figure, (axes,) = canvas()
    axes.barh(["a", "b"], [most, 1])
    show_counts(axes.xaxis)
    figure.canvas.draw()
    for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        assert float(label.get_text().replace(",", "")) == place


def test_every_table_and_figure_has_a_caption(run):
    for path in [*run.glob("tables/*.html"), *run.glob("figures/*.svg")]:
        kind = "table" if path.suffix == ".html" else "figure"
        assert (REPORT / f"{kind}_{path.stem}.rst").read_text().strip()


def test_nothing_to_draw_is_an_error(tmp_path):
    done = program("plot_figures", *COMMON, "--out-dir", tmp_path, opponent="O", judge="J")
    assert done.returncode == 1
    assert "no figure can be drawn" in done.stderr


def test_report_is_self_contained_escaped_and_tells_what_was_dropped(run, tmp_path):
    succeed("write_report", *report_inputs(run), "--out", tmp_path / "report.html", **report_settings())
    html = (tmp_path / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)|<script|<link|@import|url\(""", html)
    assert "I &lt;b&gt;feel&lt;/b&gt; tired &amp; alone." in html
    assert "It &lt;i&gt;explores&lt;/i&gt;." in html
    assert html.count("data:image/svg+xml;base64,") == 10
    assert all(f'id="table-{path.stem}"' in html for path in run.glob("tables/*.html"))
    assert "<td>compute_win_rates</td>" in html
    assert "speeches: 2 → 2" in html
    assert "A demonstration." in html
    assert "licensed professional" in html
    assert "{{" not in html


def test_a_report_of_a_run_without_policies_has_no_case_studies(run, tmp_path):
    succeed("write_report", "--run-dir", run, "--out", tmp_path / "report.html", **report_settings())
    assert "Case studies" not in (tmp_path / "report.html").read_text()


def provenance(folder: Path, name: str, program: str, started: str, **facts) -> None:
    """Write an output and its record."""
    (folder / name).write_text("x")
    run = {
        "started": started,
        "seconds": 2.0,
        "host": {"system": "s", "machine": "m", "gpus": []},
        "python": "3",
        "packages": {"numpy": "2"},
        "git": {"commit": "c" * 40, "dirty": True},
        "facts": facts,
    }
    record = {
        "identity_sha256": program + started,
        "identity": {"program": program, "settings": {"seed": 7}},
        "rows": {"rows": {"in": 5, "out": 3, "dropped": {"short": 2}}},
        "run": run,
    }
    (folder / f"{name}.prov.json").write_text(json.dumps(record))


def test_stages_sum_jobs_and_count_a_job_with_two_outputs_once(tmp_path):
    provenance(tmp_path, "b", "second", "2025-01-02", api={"requests": 4, "prompt_tokens": 10, "completion_tokens": None})
    provenance(tmp_path, "c", "second", "2025-01-02", api={"requests": 4, "prompt_tokens": 10, "completion_tokens": None})
    provenance(tmp_path, "d", "second", "2025-01-03", api={"requests": 1, "prompt_tokens": 1, "completion_tokens": 1})
    provenance(tmp_path, "a", "first", "2025-01-01")
    provenance(tmp_path, "lost", "third", "2025-01-04")
    (tmp_path / "lost").unlink()
    rows = stage_rows(read_provenance(tmp_path, besides="write_report"))
    assert [(row["program"], row["jobs"], row["seconds"]) for row in rows] == [("first", 1, 2.0), ("second", 2, 4.0)]
    assert rows[1]["units"]["rows"] == {"in": 10, "out": 6}
    assert rows[1]["dropped"]["rows"] == {"short": 4}
    assert (rows[1]["api"]["requests"], rows[1]["api"]["prompt_tokens"]) == (5, 11)
    facts = dict(environment(read_provenance(tmp_path, besides="write_report")))
    assert facts["Git commit"] == "cccccccccccc with uncommitted changes"
    assert facts["Seed"] == "7"


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(UserError, match="no provenance records"):
        read_provenance(tmp_path, besides="write_report")


def card_settings() -> dict:
    """Settings of write_cards."""
    model = {
        "name": "p",
        "title": "P",
        "kind": "policy",
        "base": "B",
        "chat": {"name": "b", "id": "org/B"},
        "licence": "Apache-2.0",
        "method": "DPO",
        "labels": "made by the rubric, not by people",
        "data": "ours",
    }
    facts = {
        "run": "r",
        "judge_of_answers": "J",
        "opponent": "O",
        "prompt": "Client Speech: {{ client_speech }}",
        "note": "A demonstration.",
    }
    return {**facts, "models": [{**model, "recipe": {"beta": 0.1, "max_steps": None, "max_length": 320}}]}


def card_files(folder: Path, *names: str) -> list:
    """Arguments of write_cards that name a manifest without a record for each model."""
    (folder / "manifest.json").write_text("{}")
    return ["--models", *(f"{name}={folder / 'manifest.json'}" for name in names)]


def test_cards_carry_the_facts(run, tmp_path):
    succeed("write_cards", *card_files(tmp_path, "p"), "--win-rates", run / "wins.json", "--out-dir", tmp_path, **card_settings())
    text = (tmp_path / "p.md").read_text()
    for words in ("made by the rubric, not by people", "A demonstration.", "licensed professional", "every comparison was a win"):
        assert words in text


def test_a_reward_model_at_chance_is_told_on_the_card_of_what_it_trained_and_in_the_summary(run, tmp_path):
    half = {"value": 0.5, "low": 0.4, "high": 0.6}
    coin = {"name": "coin", "pairs": 9, "n": 9, "kind": "reward_model", "speeches": 9, "accuracy": half, "at_chance": True, "ties": 0}
    coin |= dict.fromkeys(("accuracy_ties_half", "auc", "ece", "brier", "nll"), half) | {
        "temperature": None,
        "orders": None,
        "sections": None,
    }
    (tmp_path / "coin.json").write_text(json.dumps(coin))
    words = ["--reward-metrics", tmp_path / "coin.json", "--win-rates", run / "wins.json"]
    settings = card_settings()
    settings["models"] += [{**settings["models"][0], "name": "q", "ranked_by": "coin"}]
    succeed("write_cards", *card_files(tmp_path, "p", "q"), *words, "--out-dir", tmp_path, **settings)
    flag = (
        "The reward model that ranked its samples is not shown to rank better than chance** (accuracy 0.500 [0.400, 0.600] on 9 test pairs)"
    )
    assert [flag in (tmp_path / f"{name}.md").read_text() for name in "pq"] == [False, True]
    inputs = ["--speeches", run / "speeches.jsonl", "--pairs", run / "pairs.jsonl", *words]
    for ranked_by, told in (({"p": "coin"}, True), ({"p": "fine"}, False)):
        succeed(
            "summarise_run",
            *inputs,
            "--out",
            tmp_path / "s.txt",
            title="T",
            opponent="O",
            judge="J",
            titles={"p": "P"},
            ranked_by=ranked_by,
        )
        text = (tmp_path / "s.txt").read_text()
        assert ("P was trained on rewards that are not shown to rank better than chance" in text) is told


def test_times_and_intervals_are_shown_as_people_say_them():
    assert [duration(s) for s in (0.4, 99, 120, 7200)] == ["0 s", "99 s", "2 min", "2.0 h"]
    assert interval({"value": 0.5, "low": 0.25, "high": 0.75}) == "0.500 [0.250, 0.750]"
    assert interval({"win_rate": None, "low": None, "high": None}) == "n/a"


def test_costs_are_summed_by_stage_and_model(tmp_path):
    """Against a sum by hand: jobs of one stage and model in one row, checkpoints under their policy, what has no price named."""

    def job(rule: str, model: str, cost: float | None, batch: int = 0) -> dict:
        tokens = {"prompt_tokens": 100, "completion_tokens": 50, "cached_tokens": 10}
        parts = {"batch": {kind: batch * count for kind, count in tokens.items()}} if batch else {}
        api = {"requests": 4, "from_journal": 1, "failed": 1, "cost": cost, **tokens, **parts}
        return {"job": {"rule": rule}, "identity": {"program": "x"}, "run": {"model": {"name": model}, "facts": {"api": api}}}

    silent = {"job": {"rule": "build_pairs"}, "identity": {"program": "build_pairs"}, "run": {"model": None, "facts": {}}}
    records = [job("rate_responses", "judge", 0.5, batch=1), job("generate_responses", "a", None), job("generate_responses", "b", 0.25)]
    records += [job("judge_checkpoint", f"p.checkpoint-{n}", 1.0) for n in (1, 2)]
    table = cost_table([*records, silent], {"judge": "The judge"})
    rows = {(group, row.cells[0]): row.cells[1:] for group, row in table.rows()}
    assert [group for group, _ in rows] == ["Responses of the pool"] * 2 + ["Ratings", "Judgements of checkpoints", "All stages"]
    assert list(map(str, rows["Ratings", "The judge"])) == ["1", "4", "1", "100", "10", "50", "100", "0.50"]
    assert list(map(str, rows["Judgements of checkpoints", "p"])) == ["2", "8", "2", "200", "20", "100", "0", "2.00"]
    assert "No list price" in rows["Responses of the pool", "a"][-1].reason
    assert list(map(str, rows["All stages", "Together"])) == ["5", "20", "5", "500", "50", "250", "20", "2.75"]
    assert "only what has a list price" in table.footnotes()[-1]
    assert cost_table([silent], {}).groups == []


def test_a_report_writes_the_table_of_costs_and_shows_it(run, tmp_path):
    """Of an earlier report, which knew less, nothing is taken over."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    api = {"requests": 7, "from_journal": 0, "failed": 0, "cost": 1.25, "prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 0}
    provenance(folder, "ratings", "rate_responses", "2025-01-01", api=api)
    record = json.loads((folder / "ratings.prov.json").read_text())
    record |= {"job": {"rule": "rate_responses"}}
    record["run"]["model"] = {"name": "judge"}
    (folder / "ratings.prov.json").write_text(json.dumps(record))
    for _ in range(2):
        succeed("write_report", *report_inputs(folder), "--out-dir", folder, "--out", folder / "report.html", **report_settings())
        assert {path.name for path in folder.glob("costs.*") if path.suffix != ".json"} == {
            f"costs.{end}" for end in ("csv", "md", "tex", "html")
        }
        assert "Ratings,judge,1,7,0,10,0,5,0,1.2500," in (folder / "costs.csv").read_text()
        html = (folder / "report.html").read_text()
        assert html.count('id="table-costs"') == 1
        assert "What it cost" in html
