"""A copy of the project in which a test study runs, with the micro model and the scripted server that plays others."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from tests.fakes.micro_model import build_micro_model
from tests.fakes.openai_server import FakeServer, Reply

ROOT = Path(__file__).resolve().parents[1]

ANSWERS = {  # of clearly different quality, so that the rubric finds gaps; the word of the speech makes each its own
    "scripted-warm": "It sounds like {word} weighs on you, and it makes sense that you feel this way. You have already taken a brave"
    " step by telling me. What would you most like to be different, and how do you feel when you picture that?",
    "scripted-advice": "You should just stop worrying about {word}. You must make a list and do it. You have to exercise every day.",
    "scripted-terse": "Okay. {word}.",
    "scripted-cold": "That is your own fault. Get over {word}. Everybody has problems. It is nothing. Stop complaining.",
    "scripted-kind": "That must be hard for you: {word}. What would help you now?",
}
SCORES = {"sounds like": 5, "You should just": 3, "Okay": 2, "your own fault": 1}  # by a phrase of each; any other answer gets 2


def scripted_answer(body: dict, nth: int) -> Reply:
    """Answer as the model that is asked for, with the longest word of the message in it; the judge knows the answers by their phrases."""
    if body["model"] == "scripted-judge":
        prompt = body["messages"][-1]["content"]
        return Reply(scripted_verdict(prompt) if is_comparison(prompt) else scripted_ratings(prompt))
    word = max(body["messages"][-1]["content"].split(), key=len).strip(".,!?")
    return Reply(ANSWERS[body["model"]].format(word=word))


def is_comparison(prompt: str) -> bool:
    """Whether a judge is asked which of two answers is better."""
    return "determine which of the two is better" in prompt


def shown_responses(prompt: str) -> list[tuple[str, str]]:
    """Return the number and text of each response in a judge's prompt."""
    return re.findall(r"<response_(\d)>\n(.*?)\n</response_", prompt, flags=re.DOTALL)


def scripted_verdict(prompt: str) -> str:
    """Prefer the longer of two answers, and the first of two that are equally long."""
    first, second = (len(text) for _, text in shown_responses(prompt))
    return json.dumps({"rationale": "scripted", "better": 1 if first >= second else 2})


def scripted_ratings(prompt: str) -> str:
    """Rate the responses in a rating prompt."""
    rated = {}
    for number, text in shown_responses(prompt):
        rated[f"response_{number}_rating"] = next((score for phrase, score in SCORES.items() if phrase in text), 2)
        rated[f"rationale_{number}"] = "scripted"
    return json.dumps(rated)


@dataclass
class Project:
    """A copy of the project and what runs in it."""

    folder: Path
    server: FakeServer
    environment: dict
    sources: list[str]

    def snakemake(self, *words: str) -> subprocess.CompletedProcess:
        """Run Snakemake on the micro study to its end."""
        return subprocess.run(self.command(*words), **self.options(), capture_output=True, text=True)

    def command(self, *words: str) -> list[str]:
        """Return Snakemake's command line on the micro study."""
        study = ("--profile", "profiles/local", "--configfile", "tests/workflow/micro.yaml", "work/micro_sources.yaml")
        return [sys.executable, "-m", "snakemake", *study, *words]

    def options(self) -> dict:
        """Return how a process runs in the copy."""
        return {"cwd": self.folder, "env": self.environment}

    def path(self, name: str) -> Path:
        """Return a file of the micro run's results."""
        return self.folder / "results" / "micro" / name

    def asked(self) -> Counter:
        """Return how often each model of the server was asked each question."""
        return Counter((body["model"], body["messages"][-1]["content"]) for body in self.server.requests)


def copy_project(folder: Path) -> None:
    """Copy the project's files, as a clone would have them, with new time stamps."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        source, target = ROOT / name, folder / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target, follow_symlinks=False)


@contextmanager
def project_copy(folder: Path, script: Callable[[dict, int], Reply] = scripted_answer) -> Iterator[Project]:
    """Copy the project, build the micro model, start the scripted server."""
    copy_project(folder)
    build_micro_model(folder / "work" / "models" / "micro")
    real = Path(os.environ.get("PSYCHOCOUNSEL_SOURCES", ""), "counsel-chat", "20200325_counsel_chat.csv").is_file()
    sources = ["demo", "counsel-chat"] if real else ["demo"]  # real questions to therapists, where the source cache has them
    (folder / "work" / "micro_sources.yaml").write_text(yaml.safe_dump({"sources": sources}))
    with FakeServer(script) as server:
        endpoints = yaml.safe_load((folder / "config" / "endpoints.yaml").read_text())
        endpoints["scripted"] = endpoints["openai"] | {
            "base_url": server.url,
            "api_key_env": "SCRIPTED_KEY",
            "requests_per_minute": None,
            "tokens_per_minute": None,
        }
        (folder / "work" / "micro_endpoints.yaml").write_text(yaml.safe_dump(endpoints))
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "SCRIPTED_KEY": "canary-key-7c1d",
            "OMP_NUM_THREADS": "1",
        }
        yield Project(folder, server, environment, sources)
