"""How fast `audit.py verify` is, beside sha256sum over the same files.

Builds a run of the given size in a temporary folder (half of it the files of a model, half 200 outputs, each made from three others)
and times both as processes, from start to exit, files in the page cache. Run it from the project's root:

    python benchmarks/verify_speed.py --megabytes 1000
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, "scripts")

from psychocounsel import provenance
from psychocounsel.records import content_hash, file_sha256, write_manifest

ROOT = Path.cwd()
OUTPUTS, SHARDS = 200, 4
CONFIG = "run: benchmark\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the run (default 1000)")
    parser.add_argument("--folder", help="where to build it (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        os.chdir(folder)
        for name in ("config", "report", "scripts"):
            os.symlink(ROOT / name, name)
        Path("benchmark.yaml").write_text(CONFIG)
        build(args.megabytes * 1_000_000)
        verify = [sys.executable, "scripts/audit.py", "verify", "--configfile", "benchmark.yaml"]
        files = ["find", "results", "-type", "f"]
        one = f"{' '.join(files)} -print0 | xargs -0 sha256sum"
        all_cores = f"{' '.join(files)} -print0 | xargs -0 -n 1 -P {os.cpu_count()} sha256sum"
        timed(["bash", "-c", one])  # warms the page cache
        plain, parallel, ours = timed(["bash", "-c", one]), timed(["bash", "-c", all_cores]), timed(verify)
        for name, seconds in (("sha256sum", plain), (f"sha256sum, {os.cpu_count()} processes", parallel), ("audit.py verify", ours)):
            print(f"{name:<26} {seconds:6.2f} s  {args.megabytes / seconds:7.0f} MB/s  {seconds / plain:5.2f} x sha256sum")


def timed(command: list[str]) -> float:
    """Return the seconds that a command takes; stop where it fails."""
    clock = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - clock


def build(size: int) -> None:
    """Write a run of `size` bytes with its provenance records."""
    block, folder = os.urandom(1 << 16), Path("results/benchmark/model")
    run = provenance.surroundings(datetime.now(UTC)) | {"model": None, "chat_templates": {}, "prompts": {}, "facts": {}}
    folder.mkdir(parents=True)
    for number in range(SHARDS):
        fill(folder / f"model-{number}.safetensors", size // 2 // SHARDS, block)
    made = [write_manifest(folder)]
    record(made[0], [], run)
    for number in range(OUTPUTS):
        path = Path(f"results/benchmark/{number:03}.jsonl")
        fill(path, size // 2 // OUTPUTS, block)
        record(path, made[-3:], run)
        made.append(path)


def fill(path: Path, size: int, block: bytes) -> None:
    """Write a file of its own bytes."""
    with open(path, "wb") as file:
        file.write(str(path).encode())
        for _ in range(size // len(block)):
            file.write(block)


def record(output: Path, inputs: list[Path], run: dict) -> None:
    """Write an output's provenance record as a program would."""
    identity = provenance.identity("summarise_run", {}, {}, [provenance.used(path) for path in inputs])
    facts = {"path": output.as_posix(), "sha256": file_sha256(output), "bytes": output.stat().st_size}
    whole = {"format": provenance.FORMAT, "output": facts, "job": None, "rows": {}, "identity": identity}
    whole |= {"identity_sha256": content_hash(identity), "run": run}
    provenance.record_path(output).write_bytes(provenance.rendered(provenance.sealed(whole)))


if __name__ == "__main__":
    main()
