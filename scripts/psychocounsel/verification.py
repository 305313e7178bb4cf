"""Verify a run by its provenance records alone: every file's bytes, every record, and the chain of both back to the sources.

What is found is told by its culprit: a file altered at the root of the chain is one finding, and what was made from it is
listed as affected. Damage (missing, altered, unrecorded, a broken chain) is kept apart from what is merely outdated: whole
and consistent, but made by other code, with other settings or other files of the configuration than those of today.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import orjson

from psychocounsel.changes import changed_code, changed_settings
from psychocounsel.errors import UserError
from psychocounsel.fingerprint import SCRIPTS, code_modules
from psychocounsel.presentation import current_settings
from psychocounsel.provenance import RESULTS, SUFFIX, read_record, record_path
from psychocounsel.records import MARK, REMOVED, content_hash, file_sha256, is_removed
from psychocounsel.workflow import Workflow

MANIFEST, CHECKPOINTS, REMOVALS = "manifest.json", "checkpoints.json", "removed.json"
FINAL = ("report.html", "summary.txt")  # what a finished run has
# The report shows times and hosts from the records, so its bytes differ from one identical run to the next: the root hash
# covers what it was made from and how, not its bytes.
SHOWS_TIMES = "write_report"

MOST_CHANGES, MOST_FILES = 4, 20  # of many: settings that are named for a file, damaged files that are named in the text

DAMAGE = {  # kind -> what it says of the files under it
    "missing": "gone, though a record or a later file names them",
    "altered": "not the bytes that were written",
    "bad record": "provenance records that are broken, altered or about another file",
    "unrecorded": "without a provenance record: nothing says how they were made",
    "stale": "made from other inputs than now lie there",
}
OUTDATED = {
    "other code": "made by other code than now",
    "other settings": "made with other settings than the config has now",
    "other config file": "files of the configuration that were read and have changed since",
}
KINDS = [*DAMAGE, *OUTDATED]


@dataclass
class Finding:
    """What is wrong with one file, and the files that were made from it, directly or not."""

    kind: str
    path: str
    detail: str
    affected: list[str] = field(default_factory=list)


@dataclass
class Verdict:
    """All that a verification found."""

    findings: list[Finding]
    remarks: list[str]
    files: int
    bytes: int
    root: str | None = None  # of a whole run without damage

    @property
    def status(self) -> int:
        """The exit status: 0 all well, 1 damage, 3 whole but outdated."""
        kinds = {finding.kind for finding in self.findings}
        return 1 if kinds & DAMAGE.keys() else 3 if kinds else 0

    def as_json(self) -> dict:
        """All of it for scripts."""
        return {"status": self.status, **asdict(self)}


def verify(flow: Workflow, target: Path | None = None) -> Verdict:
    """Verify a run, or a file or folder of it with everything that it was made from."""
    folder = Path(flow.results("")).as_posix()
    outputs, remarks = find_outputs(folder, target)
    evidence = Evidence(whole=target is None)
    evidence.gather(outputs)
    evidence.hash_files()
    findings = [*own_faults(evidence), *chain_faults(evidence, flow)]
    damaged = {finding.path for finding in findings if finding.kind in DAMAGE}
    findings += outdated(evidence, flow)
    findings += mixed_jobs(evidence, {finding.path for finding in findings})
    readers = evidence.readers()
    for finding in findings:
        if finding.kind in (*DAMAGE, "other config file"):
            finding.affected = sorted(downstream(evidence.stands_for(finding.path), readers) - damaged)
    findings.sort(key=lambda finding: (KINDS.index(finding.kind), finding.path.startswith(RESULTS), finding.path))
    remarks += evidence.remarks()
    if target is None:
        remarks += [f"{folder}/{name}: not there: the run is not finished" for name in FINAL if f"{folder}/{name}" not in evidence.records]
    verdict = Verdict(findings, remarks, files=len(evidence.sha256), bytes=sum(evidence.sizes.values()))
    if target is None and verdict.status != 1:
        verdict.root = root_hash(evidence)
    return verdict


# What lies there


def find_outputs(folder: str, target: Path | None) -> tuple[list[str], list[str]]:
    """Return the outputs in a run's folder, or in a part of it, and remarks on what jobs left over.

    An output is a file, present or named by a record; a model's folder is one output, its manifest.
    """
    start = Path(os.path.relpath(target or folder))
    if not start.as_posix().startswith(f"{folder}/") and start != Path(folder):
        raise UserError(f"{start}: not in {folder}, the run of this config; name another run's config with --configfile")
    if not start.exists() and not record_path(start).is_file():
        raise UserError(f"{start}: no such file or folder" + ("; has the run been made?" if target is None else ""))
    found = list(start.rglob("*")) if start.is_dir() else [start]
    files = {path for path in found if path.is_symlink() or not path.is_dir()}
    left = {path for path in files for part in (path, *path.parents) if part.name.startswith(".") and part.name.endswith(".part")}
    outputs = {Path(str(path).removesuffix(SUFFIX)) for path in files - left}
    remarks = sorted({f"{leftover(path)}: left by a job that was killed; nothing reads it" for path in left})
    return sorted({model_of(path, folder).as_posix() for path in outputs}), remarks


def leftover(path: Path) -> str:
    """Return the outermost temporary file or folder that a path lies in."""
    return next(part.as_posix() for part in reversed((path, *path.parents)) if part.name.startswith(".") and part.name.endswith(".part"))


def model_of(path: Path, folder: str) -> Path:
    """Return the manifest of the model that a file belongs to, or the file itself."""
    inside = (parent for parent in path.parents if parent.is_relative_to(folder))
    return next((parent / MANIFEST for parent in inside if (parent / MANIFEST).is_file() or is_recorded(parent / MANIFEST)), path)


def is_recorded(path: Path) -> bool:
    """Whether a file has a record, whatever it says."""
    return record_path(path).is_file()


class Evidence:
    """Records, sizes and hashes of outputs and of everything that they were made from."""

    def __init__(self, whole: bool) -> None:
        self.whole = whole  # whether all of the run is looked at
        self.records: dict[str, dict | None] = {}  # path -> its record; None: there is none, or it is broken
        self.broken: dict[str, str] = {}  # path -> why its record cannot be believed
        self.members: dict[str, dict[str, dict]] = {}  # manifest -> file of its model -> {"sha256", "bytes"}
        self.strays: dict[str, list[str]] = {}  # manifest -> files in its folder that it does not name
        self.listed: dict[str, dict[str, str]] = {}  # checkpoints.json -> manifest -> sha256
        self.removed: dict[str, int] = {}  # manifest of a model whose files were removed by design -> their bytes
        self.removals: set[str] = set()  # such manifests, as removed.json tells
        self.sizes: dict[str, int] = {}
        self.sha256: dict[str, str] = {}  # of every file that is there

    def gather(self, outputs: list[str]) -> None:
        """Read the records of outputs and, by what they name, of everything upstream."""
        waiting = list(outputs)
        while waiting:
            path = waiting.pop()
            if path in self.records:
                continue
            record = self.records[path] = self._record(path)
            if record:
                waiting += [item["path"] for item in record["identity"]["inputs"]]
            if Path(path).name == MANIFEST:
                self._read_manifest(path)
            if Path(path).name == CHECKPOINTS:
                waiting += self._read_checkpoints(path)
            if Path(path).name == REMOVALS:
                self._read_removals(path)

    def _record(self, path: str) -> dict | None:
        try:
            record = read_record(record_path(Path(path)))
        except FileNotFoundError:
            return None
        except UserError as error:
            self.broken[path] = str(error).partition(": ")[2]
            return None
        identity = record["identity"]
        if record["output"]["path"] != path:
            self.broken[path] = f"about another file: {record['output']['path']}"
        elif identity["code"] != content_hash(identity["modules"], digits=16):
            self.broken[path] = "its fingerprint of the code is not that of the modules that it lists"
        elif identity["program"] == "fetch_source" and identity["settings"].get("sha256") not in (None, record["output"]["sha256"]):
            self.broken[path] = "of a raw file that is not the one its settings pin by sha256"
        return None if path in self.broken else record

    def _read_manifest(self, path: str) -> None:
        folder = Path(path).parent
        try:
            named = orjson.loads(Path(path).read_bytes())["files"]
            self.members[path] = {(folder / name).as_posix(): dict(facts) for name, facts in named.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # its own sha256 says that it is gone or altered
        lying = {p.as_posix() for p in folder.rglob("*") if not p.is_dir() and not p.name.startswith(MANIFEST)}
        self.strays[path] = sorted(lying - self.members[path].keys())
        if is_removed(Path(path)):
            self.removed[path] = sum(facts["bytes"] for facts in named.values())
            self.members[path] = {(folder / REMOVED).as_posix(): {"sha256": hashlib.sha256(MARK).hexdigest()}}

    def _read_checkpoints(self, path: str) -> list[str]:
        folder = Path(path).with_suffix("")
        try:
            entries = orjson.loads(Path(path).read_bytes())
            self.listed[path] = {f"{folder.as_posix()}/{entry['checkpoint']}/{MANIFEST}": entry["manifest_sha256"] for entry in entries}
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return list(self.listed[path])

    def _read_removals(self, path: str) -> None:
        try:
            self.removals |= {entry["checkpoint"] for entry in orjson.loads(Path(path).read_bytes())["removed"]}
        except (OSError, ValueError, KeyError, TypeError):
            return  # its own sha256 says that it is gone or altered

    def hash_files(self) -> None:
        """Hash every file that is there, on all cores, the largest first."""
        paths = {*self.records, *(file for files in self.members.values() for file in files)}
        self.sizes = {path: os.stat(path).st_size for path in paths if Path(path).is_file()}
        ordered = sorted(self.sizes, key=self.sizes.get, reverse=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.sha256 = dict(zip(ordered, pool.map(file_sha256, ordered), strict=True))

    def good(self) -> Iterator[tuple[str, dict]]:
        """Yield (path, record) where there is a record that can be believed."""
        return ((path, record) for path, record in self.records.items() if record)

    def intact(self, path: str) -> bool:
        """Whether a file is there with the bytes of its record."""
        record = self.records[path]
        return path in self.sha256 and record is not None and record["output"]["sha256"] == self.sha256[path]

    def read_as(self, path: str) -> set[str]:
        """Return the sha256 under which a file without a record was read; for others, and where nobody read it, its own."""
        read = {item["sha256"] for _, record in self.good() for item in record["identity"]["inputs"] if item["path"] == path}
        return read if read and self.records[path] is None else {self.sha256.get(path)}

    def readers(self) -> dict[str, set[str]]:
        """Return who read what, by the records: input -> outputs."""
        found: dict[str, set[str]] = defaultdict(set)
        for path, record in self.good():
            for item in record["identity"]["inputs"]:
                found[item["path"]].add(path)
        return found

    def stands_for(self, path: str) -> str:
        """Return the manifest of a model's file, by which others name it; else the file."""
        return next((manifest for manifest, files in self.members.items() if path in files), path)

    def remarks(self) -> list[str]:
        """What a user should know that is no fault."""
        outside = sorted(path for path in self.records if lies_outside(path, self))
        policies: dict[str, list[int]] = defaultdict(list)
        for manifest, size in self.removed.items():
            policies[Path(manifest).parents[3].as_posix()].append(size)
        by_hand = sorted(path for path, record in self.good() if record["job"] is None)
        return [
            *(
                f"{policy}: {count(sizes, 'checkpoint')} removed by design, {sum(sizes) / 1e9:,.1f} GB, when no stage needed them any more;"
                " their manifests stay and are checked"
                for policy, sizes in sorted(policies.items())
            ),
            *(f"{path}: an input outside the project, known by its name alone: not checked" for path in outside),
            *(f"{path}: made by hand, without a job of the workflow: its settings are not compared with the config" for path in by_hand),
        ]


def lies_outside(path: str, evidence: Evidence) -> bool:
    """Whether a path is the bare name under which records hold a file outside the project."""
    return "/" not in path and path not in evidence.sha256


# What is wrong


def own_faults(evidence: Evidence) -> Iterator[Finding]:
    """Yield what a file, its record and its manifest say against it, without looking at others."""
    named = {manifest: sha256 for entries in evidence.listed.values() for manifest, sha256 in entries.items()}
    written = {record["output"]["sha256"]: path for path, record in evidence.good() if record["output"]["bytes"]}
    for path, record in evidence.records.items():
        there = path in evidence.sha256
        if path in evidence.broken:
            yield Finding("bad record", path + SUFFIX, evidence.broken[path])
        elif record is None and there and path.split("/")[0] == RESULTS:
            yield Finding("unrecorded", path, f"{Path(path).name}{SUFFIX} is not there")
        if not there and not lies_outside(path, evidence):
            yield Finding("missing", path, "its record is there" if record else "named by what was made from it")
        elif record and evidence.sha256.get(path) not in (None, record["output"]["sha256"]):
            other = written.get(evidence.sha256[path])
            yield Finding("altered", path, f"holds the bytes of {other}" if other else "its sha256 is not that of its record")
        elif record and there and record["output"]["bytes"] != evidence.sizes[path]:
            yield Finding("bad record", path + SUFFIX, "names another size than the file's")
        elif path in named and there and not record and evidence.sha256[path] != named[path]:
            yield Finding("altered", path, f"its sha256 is not that in {CHECKPOINTS}")
    tellers = [path for path in evidence.records if Path(path).name == REMOVALS]
    if evidence.whole and all(map(evidence.intact, tellers)):
        for manifest in evidence.removed.keys() - evidence.removals:
            yield Finding("missing", manifest, f"its model's files are gone: a mark says by design, but no {REMOVALS} tells of it")
    for manifest, files in evidence.members.items():
        if evidence.records[manifest] and not evidence.intact(manifest) or evidence.sha256[manifest] not in evidence.read_as(manifest):
            continue  # an altered manifest says nothing about its files
        for file, facts in files.items():
            if file not in evidence.sha256:
                yield Finding("missing", file, f"named by {MANIFEST}")
            elif evidence.sha256[file] != facts.get("sha256"):
                yield Finding("altered", file, f"its sha256 is not that in {MANIFEST}")
        for file in evidence.strays[manifest]:
            yield Finding("unrecorded", file, f"not named by the {MANIFEST} of its model")


def chain_faults(evidence: Evidence, flow: Workflow) -> Iterator[Finding]:
    """Yield where what a record says of its inputs is not what lies there, by the input or the reader, whichever is to blame."""
    told: set[tuple[str, str]] = set()

    def once(finding: Finding) -> Iterator[Finding]:
        if (finding.kind, finding.path) not in told:
            told.add((finding.kind, finding.path))
            yield finding

    stale: dict[str, list[str]] = defaultdict(list)
    for reader, record in evidence.good():
        for item in record["identity"]["inputs"]:
            path = item["path"]
            made, now = evidence.records[path], evidence.sha256.get(path)
            if now is None or path in evidence.broken or (made and not evidence.intact(path)):
                continue  # the input itself is to blame, and told
            if made is None and item["identity_sha256"]:
                if path.split("/")[0] != RESULTS:  # there, own_faults tells it
                    yield from once(Finding("unrecorded", path, f"{Path(path).name}{SUFFIX} is not there"))
            elif made is None and now != item["sha256"]:
                kind = "other config file" if is_configuration(path, flow) else "altered"
                yield from once(Finding(kind, path, "not the bytes that were read when other files were made from it"))
            elif made and made["identity_sha256"] == item["identity_sha256"] and now != item["sha256"]:
                detail = (
                    "not the bytes that were read from it, though its record tells the same origin: file and record"
                    " were rewritten together, or its program does not repeat itself"
                )
                yield from once(Finding("altered", path, detail))
            elif made and made["identity_sha256"] != item["identity_sha256"]:
                stale[reader].append(path)
    for reader, inputs in stale.items():
        yield Finding("stale", reader, f"by its record, it was not made from these: {listed(inputs)}")


def is_configuration(path: str, flow: Workflow) -> bool:
    """Whether a file that no program made is a choice of the study or a template, not data."""
    named = {str(value) for value in flow.config["files"].values()}
    return path in named or path.split("/")[0] in ("config", "report")


def outdated(evidence: Evidence, flow: Workflow) -> Iterator[Finding]:
    """Yield what was made by other code or with other settings than those of now."""
    modules_now, settings_now = cache(code_modules), cache(lambda job: current_settings(flow, orjson.loads(job)))
    for path, record in evidence.good():
        identity, job = record["identity"], record["job"]
        if not (SCRIPTS / f"{identity['program']}.py").is_file():
            yield Finding("other code", path, f"the program scripts/{identity['program']}.py is gone")
        elif changes := changed_code(identity["modules"], modules_now(identity["program"])):
            yield Finding("other code", path, "; ".join(changes))
        if job:
            now = settings_now(orjson.dumps(job))
            if now is None:
                named = ", ".join(f"{name} {value}" for name, value in job["wildcards"].items())
                yield Finding("other settings", path, f"the config no longer has {named} for the rule {job['rule']}")
            elif changes := changed_settings(identity["settings"], now):
                more = [f"and {len(changes) - MOST_CHANGES} more"] if len(changes) > MOST_CHANGES else []
                yield Finding("other settings", path, "; ".join([*changes[:MOST_CHANGES], *more]))


def mixed_jobs(evidence: Evidence, told: set[str]) -> Iterator[Finding]:
    """Yield records that do not agree with those of their job's other outputs, which were written in one go."""
    jobs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, record in evidence.good():
        if record["job"] and path not in told:
            shared = {key: value for key, value in record.items() if key not in ("output", "record_sha256")}
            jobs[content_hash(record["job"])].append((content_hash(shared), path))
    for outputs in jobs.values():
        versions = [version for version, _ in outputs]
        common = max(versions, key=versions.count)
        for version, path in outputs:
            if version != common:
                yield Finding("bad record", path + SUFFIX, "does not agree with the records of its job's other outputs")


def downstream(path: str, readers: dict[str, set[str]]) -> set[str]:
    """Return everything that was made from a file, directly or not."""
    path, found = path.removesuffix(SUFFIX), set()
    waiting = [path]
    while waiting:
        new = readers.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found - {path}


def listed(paths: Iterable[str], most: int = 3) -> str:
    """Return the first paths and how many more there are."""
    paths = list(paths)
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


# The seal


def root_hash(evidence: Evidence) -> str:
    """Return one hash over the whole chain: of every record all that an identical rerun repeats, of every source its sha256.

    A model's files count through its manifest. The part `run` of the records (times, hosts, tokens) is left out. A file without
    a record counts as it was read, so that a registry edited later leaves the root of what was made before as it is.
    """
    leaves = []
    for path, record in evidence.records.items():
        if record is None:
            leaves.append((path, sorted(evidence.read_as(path))))
            continue
        lasting = {key: value for key, value in record.items() if key not in ("run", "record_sha256")}
        if record["identity"]["program"] == SHOWS_TIMES:
            lasting["output"] = {"path": path}
        leaves.append((path, content_hash(lasting)))
    return content_hash(sorted(leaves))


# For people


def report(verdict: Verdict, what: str, seconds: float) -> str:
    """Return a verdict as text: culprits first, what is affected by them in one line each, counts at the end."""
    lines = []
    for kind in KINDS:
        if findings := [finding for finding in verdict.findings if finding.kind == kind]:
            lines += [f"{kind.upper()}: {(DAMAGE | OUTDATED)[kind]}", *described(findings), ""]
    lines += [*(f"note: {remark}" for remark in verdict.remarks), *([""] if verdict.remarks else [])]
    size = verdict.bytes / 1e6
    lines.append(f"{what}: {verdict.files} files, {size:,.1f} MB, {seconds:.1f} s ({size / max(seconds, 1e-3):,.0f} MB/s)")
    return "\n".join([*lines, conclusion(verdict)])


def described(findings: list[Finding]) -> Iterator[str]:
    """Yield the lines of one kind: each culprit on its own; what is outdated, by its reason."""
    if findings[0].kind in (*DAMAGE, "other config file"):
        width = max(len(finding.path) for finding in findings[:MOST_FILES])
        for finding in findings[:MOST_FILES]:
            yield f"  {finding.path:<{width}}  {finding.detail}"
            if finding.affected:
                yield f"    affects {count(finding.affected, 'file')} made from it: {listed(finding.affected)}"
        if len(findings) > MOST_FILES:
            yield f"  … and {len(findings) - MOST_FILES} more; --json lists all"
        return
    reasons: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        reasons[finding.detail].append(finding.path)
    for detail, paths in reasons.items():
        yield f"  {detail}"
        yield f"    {count(paths, 'file')}: {listed(paths)}"


def conclusion(verdict: Verdict) -> str:
    """Say in one line what it comes to."""
    counts = ", ".join(f"{n} {kind}" for kind in KINDS if (n := sum(finding.kind == kind for finding in verdict.findings)))
    affected = {path for finding in verdict.findings for path in finding.affected}
    if verdict.status == 1:
        return f"DAMAGED: {counts}" + (f"; {count(affected, 'file')} affected" if affected else "")
    if verdict.status == 3:
        return f"OUTDATED: {counts}. Every file is the one that was written and the chain is whole; a run of Snakemake would renew these."
    return "ALL WELL: every file is the one that was written, made by the code and settings of now, and the chain is whole."


def count(things: Iterable, unit: str) -> str:
    """Return a number with its unit."""
    number = len(list(things))
    return f"{number} {unit}{'' if number == 1 else 's'}"
