"""Say what a run would do, why, and what it would cost, before it does it: Snakemake's dry run with reasons and prices.

Everything but --json goes to Snakemake: config files, profile, targets. Nothing is asked, written or locked.

    python scripts/plan_run.py --profile profiles/local --configfile config/demo.yaml
    python scripts/plan_run.py --profile slurm dataset        # the paper's run as far as the preference pairs
"""

import argparse
import sys

import orjson

from psychocounsel.errors import UserError
from psychocounsel.plan import plan
from psychocounsel.plan_text import as_json, table


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s [--json] [Snakemake's words]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON for scripts: every job, sums, notes")
    args, words = parser.parse_known_args()
    try:
        jobs = plan(words)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(orjson.dumps(as_json(jobs), option=orjson.OPT_INDENT_2).decode() if args.json else table(jobs))


if __name__ == "__main__":
    main()
