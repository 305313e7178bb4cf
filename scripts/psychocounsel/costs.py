"""What a run's requests took, by stage and model: tokens and dollars as measured, from the provenance records."""

from collections import defaultdict

from psychocounsel.journal import add_tokens
from psychocounsel.tables import Cell, Missing, Number, Row, Table, count

STAGES = {  # rules that ask models, in their order -> how they are printed
    "label_topics": "Topics of the speeches",
    "generate_responses": "Responses of the pool",
    "rate_responses": "Ratings",
    "rate_again": "Ratings, a sample again",
    "rank_pairs": "Prompted rankers",
    "sample_responses": "Samples for iterative DPO",
    "answer_opponent": "Answers of the opponent",
    "answer_speeches": "Answers of the policies",
    "answer_checkpoint": "Answers of checkpoints",
    "judge_answers": "Judgements",
    "judge_again": "Judgements, by the second judge",
    "judge_checkpoint": "Judgements of checkpoints",
}
NO_PRICE = Missing("No list price: served by ourselves, at the price of GPU hours, or computed here.")
COLUMNS = [
    "Model",
    "Jobs",
    "Requests",
    "Without an answer",
    "Tokens read",
    "of these cached",
    "Tokens written",
    "In batches (%)",
    "Cost ($)",
]


def cost_table(records: list[dict], titles: dict[str, str]) -> Table:
    """Return the table of costs from the records of a run's jobs, one a job; a checkpoint is shown under its policy, or base."""
    asked = defaultdict(list)  # (rule, model) -> what its jobs say
    for record in records:
        if api := record["run"]["facts"].get("api"):
            model = record["run"]["model"]["name"].partition(".checkpoint-")[0]
            asked[(record["job"] or {}).get("rule") or record["identity"]["program"], model].append(api)
    rules = [*STAGES, *sorted({rule for rule, _ in asked} - STAGES.keys())]
    groups = [
        (STAGES.get(rule, rule), [cost_row(titles.get(model, model), jobs) for (at, model), jobs in asked.items() if at == rule])
        for rule in rules
    ]
    everything = [api for jobs in asked.values() for api in jobs]
    groups.append(("All stages", [cost_row("Together", everything)] if everything else []))
    notes = [
        "As the endpoints reported it, for all attempts at what the run holds now, unusable ones among them; dollars by list price when a"
        " job ended, tokens of the Batch API at its share. What was asked for versions that an edit replaced is in the run's ledger alone.",
    ]
    return Table("costs", "Requests, tokens and dollars by stage and model", COLUMNS, groups, notes)


def cost_row(title: str, jobs: list[dict]) -> Row:
    """Return the sums of jobs; what has no price is left out of a sum of dollars, and said."""
    tokens, prices = add_tokens({}, None), [api["cost"] for api in jobs if api["cost"] is not None]
    for api in jobs:
        tokens = add_tokens(tokens, api)
    written = sum(tokens[kind] for kind in ("prompt_tokens", "completion_tokens"))
    batched = sum(tokens.get("batch", {}).get(kind, 0) for kind in ("prompt_tokens", "completion_tokens"))
    dollars: Cell = Number(sum(prices), 2) if prices else NO_PRICE
    notes = ["In dollars, only what has a list price."] if 0 < len(prices) < len(jobs) else []
    counts = (len(jobs), sum(api["requests"] for api in jobs), sum(api["failed"] for api in jobs))
    read = (tokens["prompt_tokens"], tokens["cached_tokens"], tokens["completion_tokens"])
    return Row([title, *map(count, counts), *map(count, read), Number(100 * batched / written if written else 0, 0), dollars], notes)
