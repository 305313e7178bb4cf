"""Put a raw file in place: from the source cache, from a path of the user's, or from its pinned address.

The cache is a folder of raw files that you have: --cache, else the environment variable PSYCHOCOUNSEL_SOURCES. Wherever the
file comes from, it is checked against its sha256 where sources.yaml or the lock file of `make pin` names one. A download that breaks
off, or whose job is killed, goes on where it was from a hidden partial file beside --out. Example:

    python scripts/fetch_source.py --cache ~/sources --out results/demo/raw/counsel-chat \\
        --settings source=counsel-chat file=counsel-chat/20200325_counsel_chat.csv sha256=c36fbce1…
"""

import os
import shutil
from pathlib import Path

from pydantic import Field

from psychocounsel.downloads import download, hub_token
from psychocounsel.errors import UserError
from psychocounsel.records import file_sha256
from psychocounsel.stage import Settings, command_line, log, stage


class FetchSettings(Settings):
    """Where the file may come from, and what it must be."""

    source: str = Field(description="name of the source in sources.yaml")
    file: str | None = Field(None, description="where the file lies below the source cache")
    path: str | None = Field(None, description="a file of this repository or of your disk, instead of cache and address")
    address: str | None = Field(None, description="pinned http(s) address")
    sha256: str | None = Field(None, description="what the file's SHA-256 must be; null: taken as it is", pattern="^[0-9a-f]{64}$")
    gated: bool = Field(False, description="nobody has it without an account; a file of the Hub is downloaded with HF_TOKEN")
    access: str | None = Field(None, description="how to get access, shown where a file is missing")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, FetchSettings)
    parser.add_argument("--cache", type=Path, help="the source cache (default: the environment variable PSYCHOCOUNSEL_SOURCES)")
    parser.add_argument("--out", required=True, type=Path, help="where to put the raw file")
    with stage(parser) as run:
        settings: FetchSettings = run.settings
        cached = find_cached(settings, run.args.cache or os.environ.get("PSYCHOCOUNSEL_SOURCES"))
        out = run.output(run.args.out)
        if cached:
            # No input of the record: the same bytes from a cache or from the address are the same raw file.
            shutil.copyfile(cached, out)
            run.note(origin="source cache")
        elif settings.path:
            if not Path(settings.path).is_file():
                raise UserError(f"source {settings.source}: {settings.path}: no such file; `path` is relative to the project's root")
            shutil.copyfile(run.uses(settings.path), out)
            run.note(origin="path")
        elif settings.address and (not settings.gated or hub_token(settings.address)):
            log.info("source %s: downloading %s", settings.source, settings.address)
            partial = run.args.out.with_name(f".{run.args.out.name}.partial")  # no output: it outlives a job that fails or is killed
            download(settings.address, partial, settings.sha256, remedy(settings))
            os.replace(partial, out)
            run.note(origin="address")
        else:
            reason = "is gated: nobody has it without an account" if settings.gated else "has no address to download it from"
            raise UserError(f"source {settings.source} {reason}, and the source cache does not have it. {remedy(settings)}")
        if settings.sha256 is None:
            run.note(unpinned=True)
        check_sha256(out, settings, str(cached or settings.path or settings.address))
        log.info("source %s: %d bytes from %s", settings.source, out.stat().st_size, run.facts["origin"])


def find_cached(settings: FetchSettings, cache: Path | str | None) -> Path | None:
    """Return the source's file in the source cache, if there is a cache that has it."""
    if not cache or not settings.file:
        return None
    if not Path(cache).is_dir():
        raise UserError(f"{cache}: no such folder; it is named as the source cache (--cache, PSYCHOCOUNSEL_SOURCES)")
    cached = Path(cache) / settings.file
    return cached if cached.is_file() else None


def remedy(settings: FetchSettings) -> str:
    """Say how to get a file by hand."""
    if settings.access:
        return settings.access
    if settings.file:
        return f"Place the file as {settings.file} below the source cache (--cache or PSYCHOCOUNSEL_SOURCES)."
    return "Give its `path`, its `address`, or the `file` that it is below the source cache, in sources.yaml."


def check_sha256(path: Path, settings: FetchSettings, origin: str) -> None:
    """Raise UserError where a file is not the one that sources.yaml names."""
    found = file_sha256(path)
    if settings.sha256 is None:
        log.info("source %s: no sha256 to check against; the file's is %s", settings.source, found)
    elif found != settings.sha256:
        raise UserError(
            f"source {settings.source}: {origin} is not the file that sources.yaml names.\n"
            f"  its SHA-256 {found}\n  expected    {settings.sha256}\n"
            "Remove the file and fetch it again or, if you mean to use this one, put its sum into sources.yaml."
        )


if __name__ == "__main__":
    main()
