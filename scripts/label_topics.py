"""Give each client speech one of the fine topics (paper, Table 5): the source's label where it has one, else a judge's choice.

A source's label counts where it is a topic's own name or one of the aliases, whatever its case. A speech with an unknown
label is judged like one without. A speech on which the judge fails gets the topic "others"; the failure is recorded.
"""

from collections import Counter

from pydantic import Field

from psychocounsel.asking import AskSettings, add_request_arguments, ask
from psychocounsel.chat import ChatRequest, Lazy
from psychocounsel.errors import UserError, nearest
from psychocounsel.models import Part, chat_messages
from psychocounsel.parsing import parse_topic, topic_schema
from psychocounsel.prompts import render
from psychocounsel.stage import command_line, log, stage

FALLBACK = "others"


class FineTopic(Part):
    """A fine topic."""

    keywords: list[str]


class CoarseTopic(Part):
    """A coarse topic with its fine topics."""

    title: str
    fine: dict[str, FineTopic]


class TopicSettings(AskSettings):
    """The judge of unlabelled speeches, and the topics."""

    taxonomy: dict[str, CoarseTopic] = Field(
        description="coarse topic -> title and fine topics; the keywords serve the offline judge alone"
    )
    aliases: dict[str, str] = Field(description="label of a source -> fine topic")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, TopicSettings)
    parser.add_argument("--speeches", required=True, help="selected speeches")
    parser.add_argument("--out", required=True, help="topics, one a speech")
    add_request_arguments(parser)
    with stage(parser) as run:
        coarse_of = {fine: coarse for coarse, entry in run.settings.taxonomy.items() for fine in entry.fine}
        topic_of = topics_by_label(list(coarse_of), run.settings.aliases)
        speeches = run.read(run.args.speeches, "unique_speech")
        labelled = {s["speech_id"]: topic_of[folded(s["topic_label"])] for s in speeches if folded(s["topic_label"]) in topic_of}
        unlabelled = [s for s in speeches if s["speech_id"] not in labelled]

        taxonomy = run.settings.model_dump()["taxonomy"]
        requests = Lazy(unlabelled, lambda speech: topic_request(speech, taxonomy, run.settings))
        answers, failures = ask(run, requests, lambda request, raw: parse_topic(raw, coarse_of), topic_schema(coarse_of))

        rows = [row(speech_id, topic, coarse_of, "source") for speech_id, topic in labelled.items()]
        for answer in answers:
            topic = parse_topic(answer.text, coarse_of)
            rows.append(row(answer.id, topic, coarse_of, "judge", run.settings.model.name, answer.text, answer.request_key))
        for failure in failures:
            rows.append(row(failure.id, FALLBACK, coarse_of, "judge", run.settings.model.name, None, failure.request_key))
        unknown = Counter(s["topic_label"] for s in unlabelled if s["topic_label"])
        for label, count in sorted(unknown.items()):
            log.warning("label %r of %d speeches is no topic and has no alias: judged", label, count)
        run.note(topics={"source": len(labelled), "judge": len(answers), "judge failed": len(failures), "unknown labels": dict(unknown)})
        run.account("speeches", len(speeches), len(rows))
        run.write(run.args.out, rows, "topic", sort_by="speech_id")


def topics_by_label(topics: list[str], aliases: dict[str, str]) -> dict[str, str]:
    """Return folded label -> fine topic; raise UserError for an alias of no topic, and where the fallback is no topic."""
    for label, topic in [*aliases.items(), ("a failed judge", FALLBACK)]:
        if topic not in topics:
            raise UserError(f"taxonomy: {label!r} stands for {topic!r}, which is no fine topic.{nearest(topic, topics)}")
    return {folded(label): topic for label, topic in [*aliases.items(), *zip(topics, topics, strict=True)]}


def folded(label: str | None) -> str | None:
    """Return a label without its case and outer white space."""
    return label.strip().casefold() if label else None


def topic_request(speech: dict, taxonomy: dict, settings: TopicSettings) -> ChatRequest:
    """Return the request that chooses a topic."""
    prompt = render(settings.prompt, client_speech=speech["text"], coarse=taxonomy)
    task = {"kind": "topic", "speech": speech["text"], "taxonomy": taxonomy}
    return ChatRequest(id=speech["speech_id"], messages=chat_messages(settings.model, prompt), task=task)


def row(
    speech_id: str, topic: str, coarse_of: dict, topic_from: str, judge: str | None = None, raw: str | None = None, key: str | None = None
) -> dict:
    """Return the topic record of a speech."""
    facts = {"speech_id": speech_id, "topic": topic, "coarse_topic": coarse_of[topic], "topic_from": topic_from}
    return {**facts, "judge": judge, "raw": raw, "request_key": key}


if __name__ == "__main__":
    main()
