"""Give each client speech one of the fine topics (paper, Table 5): the source's label where it has one, else a judge's choice.

A source's label counts where it is a topic's own name or one of the aliases, whatever its case. A speech with an unknown
label is judged like one without. A speech on which the judge fails gets the topic "others"; the failure is recorded.
"""

from pydantic import Field

from psychocounsel.asking import AskSettings, add_request_arguments, ask
from psychocounsel.chat import ChatRequest, Lazy
from psychocounsel.models import chat_messages
from psychocounsel.parsing import parse_topic, topic_schema
from psychocounsel.prompts import render
from psychocounsel.stage import command_line, stage
from psychocounsel.topics import FALLBACK, CoarseTopic, coarse_topics, labelled_topics, topic_row, unknown_labels


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
        coarse_of = coarse_topics(run.settings.taxonomy)
        speeches = run.read(run.args.speeches, "unique_speech")
        labelled = labelled_topics(speeches, list(coarse_of), run.settings.aliases)
        unlabelled = [s for s in speeches if s["speech_id"] not in labelled]

        taxonomy = run.settings.model_dump()["taxonomy"]
        requests = Lazy(unlabelled, lambda speech: topic_request(speech, taxonomy, run.settings))
        answers, failures = ask(run, requests, lambda request, raw: parse_topic(raw, coarse_of), topic_schema(coarse_of))

        rows = [topic_row(speech_id, topic, coarse_of, "source") for speech_id, topic in labelled.items()]
        for answer in answers:
            topic = parse_topic(answer.text, coarse_of)
            rows.append(topic_row(answer.id, topic, coarse_of, "judge", run.settings.model.name, answer.text, answer.request_key))
        for failure in failures:
            rows.append(topic_row(failure.id, FALLBACK, coarse_of, "judge", run.settings.model.name, None, failure.request_key))
        counts = {"source": len(labelled), "judge": len(answers), "judge failed": len(failures)}
        run.note(topics=counts | {"unknown labels": unknown_labels(unlabelled)})
        run.account("speeches", len(speeches), len(rows))
        run.write(run.args.out, rows, "topic", sort_by="speech_id")


def topic_request(speech: dict, taxonomy: dict, settings: TopicSettings) -> ChatRequest:
    """Return the request that chooses a topic."""
    prompt = render(settings.prompt, client_speech=speech["text"], coarse=taxonomy)
    task = {"kind": "topic", "speech": speech["text"], "taxonomy": taxonomy}
    return ChatRequest(id=speech["speech_id"], messages=chat_messages(settings.model, prompt), task=task)


if __name__ == "__main__":
    main()
