"""The whole way from raw sources to the released pairs, on made-up speeches and a stub server's answers: time and memory of every stage.

Runs the real workflow of the paper's config (its sources, its pool of 20 models, its judge) on two cores, in a folder of its own, with
the raw files of synthetic_sources.py, and all models at the address of tests/fakes/stub_server.py. Nothing is trained: a base and a
ranker stand in the evaluation. A row of the table is a rule; wall, CPU and peak memory are those of its programs, as the kernel counts
them. Run it from the project's root:

    python benchmarks/full_scale.py --speeches 26483 --rerun        # the paper's scale: about half an hour
    python benchmarks/full_scale.py --speeches 1000 --folder work/full-scale      # kept: the same command again asks nothing twice
"""

import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path.insert(0, "scripts")
sys.path.insert(0, "tests")

from fakes.stub_server import StubServer
from synthetic_sources import PAPER_SPEECHES, SOURCES, write_sources

from psychocounsel.records import file_sha256

ROOT = Path.cwd()
RUN = "full-scale"
LINKED = ("Snakefile", "rules", "scripts", "config", "envs", "profiles", "report", "resources", "requirements")
CORES, IN_FLIGHT = 2, 500
MOST_SECONDS, MOST_MB = 120, 4000  # of a stage that asks nothing; an asking one has the latter limit

# Stands as `python` in front of every program: runs it and notes what the kernel counted of it and its children.
MEASURE = """#!{python} -IS
import json, os, signal, sys, time
started = time.time()
child = os.posix_spawn({python!r}, [{python!r}, *sys.argv[1:]], os.environ)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(child, number))
_, status, used = os.wait4(child, 0)
facts = {{"command": sys.argv[1:], "started": started, "ended": time.time(), "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss}}
with open({log!r}, "a") as file:
    file.write(json.dumps(facts) + "\\n")
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--speeches", type=int, default=1000, help=f"client speeches that survive the selection (default 1000; paper {PAPER_SPEECHES})"
    )
    parser.add_argument("--delay", type=float, default=0.5, help="seconds that the stub server waits before each answer (default 0.5)")
    parser.add_argument("--folder", type=Path, help="where to run, and to keep what was made; default: a temporary folder")
    parser.add_argument("--rerun", action="store_true", help="run a second time without results, so that the journals answer everything")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, StubServer(args.delay) as stub:
        folder = (args.folder or Path(temporary)).resolve()
        cells = prepare(folder, args.speeches, stub.url)
        print(f"{cells:,} cells of raw files, {args.speeches:,} speeches; the stub answers after {args.delay:g} s")
        run(folder, stub)
        if args.rerun:
            print("\nThe same without results: all answers come from the journals")
            run(folder, stub)


def prepare(folder: Path, speeches: int, url: str) -> int:
    """Write raw files, study and shim into a folder that looks like the project; return the number of cells in the raw files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    registry = yaml.safe_load(Path("config/sources.yaml").read_text(encoding="utf-8"))
    files = {name: registry[name]["file"] for name in SOURCES}
    cells = write_sources(folder / "raw", files, speeches)
    sources = {name: {"sha256": file_sha256(folder / "raw" / file)} for name, file in files.items()}
    sources["phi2mental"]["columns"] = {"text": "input"}
    endpoints = yaml.safe_load(Path("config/endpoints.yaml").read_text(encoding="utf-8"))
    at_stub = {"kind": "openai", "base_url": url, "api_key_env": None, "requests_per_minute": None, "tokens_per_minute": None}
    at_stub |= {"concurrency": IN_FLIGHT, "server": None, "server_args": [], "start_timeout_s": None}
    endpoints |= {name: endpoints[name] | at_stub for name in ("openai", "cohere", "vllm")}
    study = {
        "run": RUN,
        "title": "Benchmark: made-up speeches, a stub server's answers",
        "note": "A benchmark: the speeches are made up, and a stub server answered in place of every model and of the judge.",
        "files": {"sources": ["config/sources.yaml", "sources.yaml"], "endpoints": "endpoints.yaml"},
        "source_cache": "raw",
        "split": {"test_speeches": max(1, 3291 * speeches // PAPER_SPEECHES)},
        "reward_models": [],
        "reward_evaluation": {"baselines": [], "rankers": ["llama-3.1-8b-instruct-ranker"], "benchmark": None, "ablation": []},
        "release": {"rights": list(SOURCES)},  # all of it: nobody's words
        "policies": [{"name": "llama3-3b", "base": "llama-3.2-3b-instruct", "method": "none"}],
        "evaluation": {"policies": ["llama3-3b"], "checkpoints": [], "ablation": []},
    }
    for name, content in (("sources", sources), ("endpoints", endpoints), ("study", study)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    shim = folder / "bin" / "python"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(MEASURE.format(python=sys.executable, log=str(folder / "measured.jsonl")))
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    return cells


def run(folder: Path, stub: StubServer) -> None:
    """Run the workflow from nothing but raw files and journals; print its table."""
    for stale in (f"results/{RUN}", "work/cache", ".snakemake", "measured.jsonl"):
        path = folder / stale
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / "measured.jsonl").touch()
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--cores", str(CORES), "--configfile", "study.yaml"]
    environment = {name: value for name, value in os.environ.items() if name != "PSYCHOCOUNSEL_SOURCES"}
    environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    before, clock = stub.count(), time.perf_counter()
    with open(folder / "snakemake.log", "w") as log:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
    wall, after = time.perf_counter() - clock, stub.count()
    if status:
        sys.exit(f"snakemake failed; the end of its log:\n{(folder / 'snakemake.log').read_text()[-3000:]}")
    jobs = [json.loads(line) for line in (folder / "measured.jsonl").read_text().splitlines()]
    stages = sum_up(jobs, read_records(folder / "results" / RUN))
    cpu = used.ru_utime + used.ru_stime
    print_table(stages, sum(job["ended"] - job["started"] for job in jobs))
    print(
        f"{wall:.0f} s in all, {idle(jobs, wall):.0f} s of them without a program running; {cpu:.0f} s of CPU, of which Snakemake"
        f" {cpu - sum(job['cpu'] for job in jobs):.0f} s; the stub answered {after['requests'] - before['requests']:,} requests in"
        f" {after['cpu_s'] - before['cpu_s']:.0f} s of CPU more"
    )
    print(verdict(stages))


def job_of(command: list[str]) -> dict:
    """Return rule and wildcards that a program's command line names in its settings; a program without them goes by its own name."""
    for word in command:
        if word.startswith("{") and (job := json.loads(word).get("job")):
            return job
    return {"rule": Path(command[0]).stem, "wildcards": {}}


def read_records(results: Path) -> dict[str, dict]:
    """Return the provenance record of one output of each job, by the job."""
    found = {}
    for path in sorted(results.rglob("*.prov.json")):
        record = json.loads(path.read_bytes())
        found[json.dumps(record["job"], sort_keys=True)] = record
    return found


def sum_up(jobs: list[dict], records: dict[str, dict]) -> list[dict]:
    """Return what each rule took, in the order of first starts."""
    stages: dict[str, dict] = {}
    for job in sorted(jobs, key=lambda job: job["started"]):
        name = job_of(job["command"])
        stage = stages.setdefault(name["rule"], {"rule": name["rule"], "jobs": 0, "wall": 0, "longest": 0, "cpu": 0, "peak": 0, "asked": 0})
        seconds = job["ended"] - job["started"]
        stage["jobs"] += 1
        stage["wall"] += seconds
        stage["longest"] = max(stage["longest"], seconds)
        stage["cpu"] += job["cpu"]
        stage["peak"] = max(stage["peak"], job["peak"] * 1024 / 1e6)
        record = records.get(json.dumps(name, sort_keys=True))
        if record is None:
            continue
        api = record["run"]["facts"].get("api")
        if api:
            stage["asked"] += api["requests"] - api["from_journal"]
            stage["journal"] = stage.get("journal", 0) + api["from_journal"]
        for unit, count in record["rows"].items():
            sums = stage.setdefault("rows", {}).setdefault(unit, [0, 0])
            sums[0] += count["in"]
            sums[1] += count["out"]
    return list(stages.values())


def print_table(stages: list[dict], wall: float) -> None:
    """Print a line a rule; rows are those of the account with most of them."""
    print("rule                   jobs   wall s  share  longest   CPU s  peak MB    asked a second     kept  rows")
    for stage in stages:
        rows = max(stage.get("rows", {}).items(), key=lambda item: item[1][0], default=None)
        shown = f"{rows[0]}: {rows[1][0]:,} -> {rows[1][1]:,}" if rows else ""
        asked = f"{stage['asked']:>8} {stage['asked'] / stage['wall']:>8.0f} {stage['journal']:>8}" if "journal" in stage else " " * 26
        print(
            f"{stage['rule']:<22} {stage['jobs']:>4} {stage['wall']:>8.1f} {stage['wall'] / wall:>6.1%} {stage['longest']:>8.1f}"
            f" {stage['cpu']:>7.1f} {stage['peak']:>8.0f} {asked}  {shown}"
        )


def idle(jobs: list[dict], wall: float) -> float:
    """Return the seconds of the run in which no program ran: Snakemake's own."""
    busy, until = 0.0, 0.0
    for job in sorted(jobs, key=lambda job: job["started"]):
        busy += max(0.0, job["ended"] - max(until, job["started"]))
        until = max(until, job["ended"])
    return wall - busy


def verdict(stages: list[dict]) -> str:
    """Say which stages take more than they may."""
    over = [
        f"{stage['rule']} ({stage['longest']:.0f} s, {stage['peak']:.0f} MB)"
        for stage in stages
        if stage["peak"] > MOST_MB or (stage["longest"] > MOST_SECONDS and not stage["asked"])
    ]
    limits = f"{MOST_SECONDS} s (asking apart) or {MOST_MB:,} MB"
    return f"more than {limits}: {', '.join(over)}" if over else f"no stage took more than {limits}"


if __name__ == "__main__":
    main()
