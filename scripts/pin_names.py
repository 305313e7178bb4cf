"""Resolve every name that may stand for something else tomorrow, and write what it stands for today to config/pins.lock.yaml.

Run it once, where there is a network: each model of the Hugging Face Hub without a revision gets its newest commit, each file of a
source without a sha256 gets the sum that the Hub names or that its bytes have. A file that cannot be had from its place is summed where
the source cache holds it. What cannot be resolved is named with the steps to take; the rest is written all the same. What is pinned
stays as it is, unless --update asks for the newest of everything. Exit status: 0 all is pinned, 1 something is not.

    python scripts/pin_names.py                                   # config/config.yaml; `make pin` is the same
    python scripts/pin_names.py --configfile mine.yaml --update

HF_TOKEN (an account that was granted access to gated names) and HF_ENDPOINT (a mirror) are read from the environment.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import yaml
from tabulate import tabulate

from psychocounsel.config import load_pins, load_registries, load_study, read_config
from psychocounsel.downloads import download
from psychocounsel.errors import UserError
from psychocounsel.pins import hub_address, is_unpinned_model, is_unpinned_source, location
from psychocounsel.records import file_sha256

CONFIG = Path("config/config.yaml")
HEADING = """\
# Written by `make pin`: what names of the Hub and files without a checksum in models.yaml and sources.yaml stand for. Keep it in git
# with your study. A line that is taken out is resolved anew the next time; a revision or sha256 in those files wins over it.
"""


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--configfile", nargs="+", type=Path, default=[], metavar="FILE", help=f"the study's config files, over {CONFIG}, as for Snakemake"
    )
    parser.add_argument("--update", action="store_true", help="resolve again what is pinned already")
    args = parser.parse_args()
    try:
        files = [CONFIG, *args.configfile]
        config = load_study(read_config(files), files).config
        lock = Path(config["files"]["pins"])
        before = load_pins(lock)
        after, failed = resolve(config, {"models": {}, "files": {}} if args.update else before)
    except UserError as error:
        sys.exit(f"error: {error}")
    for kind in after:  # what an update could not resolve stays as it was
        after[kind] = dict(sorted((before[kind] | after[kind]).items()))
    if after != before:
        write(lock, HEADING + yaml.safe_dump(after, sort_keys=False, width=1000))
    print(changes(before, after) or f"{lock}: nothing changed.")
    if failed:
        names = {reason: ", ".join(name for name, why in failed.items() if why == reason) for reason in failed.values()}
        listed = "\n".join(f"  {names[reason]}: {reason}" for reason in names)
        sys.exit(f"not pinned, {len(failed)} of {len(failed) + sum(map(len, after.values()))}:\n{listed}")


def resolve(config: dict, known: dict[str, dict]) -> tuple[dict[str, dict], dict[str, str]]:
    """Return the pins of all that the registries leave open, those that are known as they are; and why others have none."""
    registries, hub = load_registries(config), Hub()
    cache = os.environ.get("PSYCHOCOUNSEL_SOURCES") or config["source_cache"]
    models, files, failed = dict(known["models"]), dict(known["files"]), {}
    for entry in registries["models"].values():
        name = entry["id"]
        if is_unpinned_model(entry, registries["endpoints"]) and name not in models and name not in failed:
            try:
                models[name] = hub.model_commit(name)
            except UserError as error:
                failed[name] = str(error)
    for source, entry in registries["sources"].items():
        name = location(entry)
        is_open = is_unpinned_source(entry) or ("hub" in entry and entry.get("revision") is None)
        cached = Path(cache, entry["file"]) if cache and "file" in entry else None
        if is_open and name not in files:
            try:
                files[name] = file_pin(entry, hub)
            except UserError as error:
                if cached and cached.is_file():
                    files[name] = {"revision": None, "sha256": file_sha256(cached)}
                else:
                    by_hand = "" if hub.unreachable else f" Or place the file as {entry.get('file')} below the source cache."
                    failed[source] = f"{error} {entry['access']}" if "access" in entry else f"{error}{by_hand}"
    return {"models": models, "files": files}, failed


def file_pin(entry: dict, hub: "Hub") -> dict:
    """Return the commit and the sha256 of a source's file; raise UserError where neither the Hub nor an address has it."""
    if "hub" in entry:
        return hub.file(entry["hub"]["repository"], entry["hub"]["path"], entry.get("revision"))
    if entry.get("address"):
        return {"revision": entry["revision"], "sha256": sha256_of(entry["address"])}
    raise UserError("it has no address, and the source cache does not have it.")


class Hub:
    """The Hugging Face Hub, or the mirror that HF_ENDPOINT names; once it cannot be reached, it is not tried again."""

    def __init__(self) -> None:
        from huggingface_hub import HfApi

        self.api, self.unreachable = HfApi(), ""

    def model_commit(self, name: str) -> str:
        """Return the newest commit of a model."""
        return self._asked(name, lambda: self.api.model_info(name, timeout=30)).sha

    def file(self, repository: str, path: str, revision: str | None) -> dict:
        """Return commit and sha256 of a data set's file; the Hub names the sums of large files, others are downloaded for it."""
        info = self._asked(
            f"datasets/{repository}", lambda: self.api.dataset_info(repository, revision=revision, files_metadata=True, timeout=30)
        )
        files = {sibling.rfilename: sibling for sibling in info.siblings or []}
        if path not in files:
            raise UserError(f"{repository} has no file {path} at {info.sha}. It has: {', '.join(sorted(files)) or 'none'}. Mend `hub`.")
        large = files[path].lfs
        return {"revision": info.sha, "sha256": large.sha256 if large else sha256_of(hub_address(repository, path, info.sha))}

    def _asked(self, name: str, ask):
        """Return an answer of the Hub; raise UserError that says why there is none and what to do."""
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

        if self.unreachable:
            raise UserError(self.unreachable)
        try:
            return ask()
        except GatedRepoError:
            raise UserError(f"gated: accept its terms at {self.api.endpoint}/{name} and set HF_TOKEN to a token of that account.") from None
        except RevisionNotFoundError:
            raise UserError(f"{self.api.endpoint}/{name} does not have the revision that is named for it.") from None
        except RepositoryNotFoundError:
            raise UserError(
                f"{self.api.endpoint}/{name} is not there, or hidden from this account: mend the name, or set HF_TOKEN."
            ) from None
        except HfHubHTTPError as error:
            raise UserError(f"{self.api.endpoint}/{name}: the server answers {error.response.status_code}.") from None
        except (HTTPError, OSError) as error:
            self.unreachable = f"{self.api.endpoint} cannot be reached ({type(error).__name__}): run this where there is a network."
            raise UserError(self.unreachable) from None


def sha256_of(address: str) -> str:
    """Return the SHA-256 of the file at an address, which is downloaded and not kept."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "file")
        download(address, file, None, "")
        return file_sha256(file)


def changes(before: dict[str, dict], after: dict[str, dict]) -> str:
    """Return a table of the pins that are new or differ; empty where none is."""
    rows = [
        [name, shown(before[kind].get(name)), shown(pin)]
        for kind, pins in after.items()
        for name, pin in pins.items()
        if pin != before[kind].get(name)
    ]
    return tabulate(rows, headers=["name", "was", "is"], disable_numparse=True) if rows else ""


def shown(pin: str | dict | None) -> str:
    """Write a pin for people, hashes by their first digits."""
    if isinstance(pin, dict):
        commit = f"commit {pin['revision'][:12]}, " if pin["revision"] else ""
        return f"{commit}sha256 {pin['sha256'][:12]}"
    return f"commit {pin[:12]}" if pin else "-"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    main()
