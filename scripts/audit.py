"""Audit a run: is every file the one that was written, and how did a table's cell come about?

Only `why` needs Snakemake; the others read files alone.

    python scripts/audit.py verify --configfile config/demo.yaml
    python scripts/audit.py verify results/demo/10_tables --configfile config/demo.yaml
    python scripts/audit.py seal --configfile config/demo.yaml
    python scripts/audit.py explain win_rates --row 3 --column Overall --configfile config/demo.yaml

Run it from the project's root.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

import orjson

from psychocounsel import verification
from psychocounsel.config import load_study, read_config
from psychocounsel.errors import UserError
from psychocounsel.workflow import Workflow

CONFIG = Path("config/config.yaml")  # what the Snakefile starts from

VERIFY = """
Recomputes the sha256 of every output, of the files of every model, and of every input back to the raw sources, the checksums
of every provenance record, and the hash chain between them. Names the culprit first and, under it, what was made from it.

exit status:
  0  all well
  1  damage: missing, altered, unrecorded, or made from other inputs than now lie there
  2  a mistake in the command or in the config: nothing was verified
  3  whole, but outdated: made by other code or with other settings than now
"""
SEAL = """
Verifies the whole run and prints one hash over all of it: the run's root. Put it into a paper, a git tag or a registrar's hands;
`verify --root HASH` then catches even one who rewrites a file and every record. An identical rerun has the same root: times,
hosts and costs do not count, and report.html and the table of costs, which show them, count by what they were made from.
A damaged run has no root: exit status 1, and nothing on standard output; what is wrong, or outdated, goes to standard error.
"""

EXPLAIN = """
Tells how a cell of a table came about: the formula, the files and records under it with file and line, down to the raw rows of
client speeches, the raw answers of models and the keys of their requests. The cell is made again from the table's inputs and,
for win rates and reward models, from single judgements or predictions; exit status 1 where that does not agree.
"""
WHY = """
Asks Snakemake what it would run to renew a file, and tells from the records why: down the chain to the settings, code or files that
changed; with the requests, tokens, money and GPU hours that it would take. Nothing is run. `make plan` tells the same of a whole run.
"""


def main() -> None:
    """Run one of the subcommands and exit with its status."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end in silence where a reader such as `head` has seen enough
    args = command_line().parse_args()
    try:
        sys.exit(args.subcommand(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_verify, add_seal, add_explain, add_why):
        add(commands)
    return parser


def subcommand(commands, name: str, function, title: str, description: str) -> argparse.ArgumentParser:
    """Add a subcommand that is told the config as Snakemake is."""
    parser = commands.add_parser(
        name, help=title, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(subcommand=function)
    parser.add_argument(
        "--configfile", nargs="+", type=Path, default=[], metavar="FILE", help=f"the run's config files, over {CONFIG}, as for Snakemake"
    )
    return parser


def load_workflow(args: argparse.Namespace) -> Workflow:
    """Return the workflow of the config that the command line names."""
    for file in args.configfile:
        if file.suffix not in (".yaml", ".yml", ".json"):
            raise UserError(f"--configfile {file}: not a config file; is it TARGET? Then name it before --configfile, or after --")
    files = [CONFIG, *args.configfile]
    return Workflow(load_study(read_config(files), files))


# verify


def add_verify(commands) -> None:
    """Add the subcommand verify."""
    parser = subcommand(commands, "verify", verify, "check every file and the chain of records back to the sources", VERIFY)
    parser.add_argument("target", nargs="?", type=Path, metavar="TARGET", help="a file or folder of the run (default: the whole run)")
    parser.add_argument("--root", metavar="HASH", help="the root that `seal` printed: the run must be that run")
    parser.add_argument("--json", metavar="FILE", help="write all findings here, as JSON; - for standard output, instead of the text")


def verify(args: argparse.Namespace) -> int:
    """Verify a run, print what was found."""
    if args.root and args.target:
        raise UserError("--root is of the whole run; leave TARGET out")
    flow, clock = load_workflow(args), time.perf_counter()
    verdict = verification.verify(flow, args.target)
    seconds = time.perf_counter() - clock
    unsealed = args.root is not None and args.root != verdict.root
    status = 1 if unsealed else verdict.status
    if args.json:
        facts = {
            "run": flow.run,
            **verdict.as_json(),
            "status": status,
            "seconds": round(seconds, 3),
            "sealed": not unsealed if args.root else None,
        }
        content = orjson.dumps(facts, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        sys.stdout.write(content.decode()) if args.json == "-" else Path(args.json).write_bytes(content)
    if args.json != "-":
        print(verification.report(verdict, (args.target or Path(flow.results(""))).as_posix(), seconds))
        if args.root:
            print(root_line(args.root, verdict))
    return status


def root_line(root: str, verdict: verification.Verdict) -> str:
    """Say whether the run is the one that was sealed."""
    if verdict.root is None:
        return "NOT THE SEALED RUN: a damaged run has no root."
    if verdict.root != root:
        return f"NOT THE SEALED RUN: its root is {verdict.root}. Files and records agree, but were written after the seal."
    return "SEALED: the run has this root."


# seal


def add_seal(commands) -> None:
    """Add the subcommand seal."""
    subcommand(commands, "seal", seal, "print one hash over the whole run, for a paper or a git tag", SEAL)


def seal(args: argparse.Namespace) -> int:
    """Print the run's root hash; what is wrong goes to standard error."""
    flow = load_workflow(args)
    clock = time.perf_counter()
    verdict = verification.verify(flow)
    if verdict.findings or verdict.remarks:
        print(verification.report(verdict, Path(flow.results("")).as_posix(), time.perf_counter() - clock), file=sys.stderr)
    if verdict.root:
        print(verdict.root)
    return int(verdict.root is None)


# explain


def add_explain(commands) -> None:
    """Add the subcommand explain."""
    parser = subcommand(commands, "explain", explain, "tell what a cell of a table was computed from", EXPLAIN)
    parser.add_argument("table", metavar="TABLE", help="a table's name, e.g. win_rates, or its CSV file")
    parser.add_argument("--row", required=True, help="the row's number, or words of its label, parts of it with | between them")
    parser.add_argument("--column", required=True, help="the column's header in the CSV file; an interval's ends are columns too")
    parser.add_argument("--all", action="store_true", help="show every record, not the first few")
    parser.add_argument("--show-text", action="store_true", help="show the words of clients and models: sensitive")
    parser.add_argument("--json", action="store_true", help="as JSON")


def explain(args: argparse.Namespace) -> int:
    """Explain a cell."""
    from psychocounsel.explanation import told
    from psychocounsel.lineage import explain as explain_cell  # scikit-learn takes seconds to load

    explanation = explain_cell(load_workflow(args), args.table, args.row, args.column, everything=args.all)
    if args.json:
        sys.stdout.write(orjson.dumps(explanation.as_json(args.show_text), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())
    else:
        print(told(explanation, args.show_text))
    return int(not explanation.sound)


# why


def add_why(commands) -> None:
    """Add the subcommand why."""
    parser = subcommand(commands, "why", why, "tell why a file would be made again, and what that would cost", WHY)
    parser.add_argument("target", metavar="TARGET", help="a file of the run, or the name of a rule without wildcards")
    parser.add_argument("--profile", default="profiles/local", help="Snakemake's profile: its resources tell GPU hours")


def why(args: argparse.Namespace) -> int:
    """Tell why a file would be made again."""
    from psychocounsel.plan_text import explain as explain_plan  # Snakemake takes a second to load

    files = ["--configfile", *map(str, args.configfile)] if args.configfile else []
    print(explain_plan(args.target, ["--profile", args.profile, *files]))
    return 0


if __name__ == "__main__":
    main()
