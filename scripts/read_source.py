"""Read a raw file of client speeches by its source's adapter: one record a speech, with the row that it comes from.

The text stays as the file has it. Cells without a text go to the side file --dropped. Example:

    python scripts/read_source.py --raw sources/counsel-chat.csv --out rows.jsonl --dropped dropped.jsonl \\
        --settings source=counsel-chat adapter=counsel_chat

For a file of your own, take the adapter generic and name its columns (CSV, JSON, JSON Lines or Parquet):

    --settings '{"source": "mine", "adapter": "generic", "columns": {"text": "question", "topic": "label"}}'
"""

from pathlib import Path

from pydantic import Field

from psychocounsel.adapters import Columns, read_speeches, text_fault
from psychocounsel.errors import UserError
from psychocounsel.stage import Settings, command_line, dropped_by_reason, stage


class ReadSettings(Settings):
    """A source, and how its file is read."""

    source: str = Field(description="name of the source in sources.yaml")
    adapter: str = Field(description="how the file is read: see psychocounsel/adapters.py")
    columns: Columns | None = Field(None, description="columns {text, topic, key}; null: the adapter's own")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, ReadSettings)
    parser.add_argument("--raw", required=True, type=Path, help="the raw file")
    parser.add_argument("--out", required=True, type=Path, help="source_row records")
    parser.add_argument("--dropped", required=True, type=Path, help="cells that were left out, with the reason")
    with stage(parser) as run:
        settings: ReadSettings = run.settings
        rows, dropped = read(run.uses(run.args.raw), settings)
        run.account("cells", len(rows) + len(dropped), len(rows), dropped_by_reason(dropped))
        if not rows:
            raise UserError(f"{run.args.raw}: no cell holds a text ({dict(dropped_by_reason(dropped))}); is `columns` right?")
        run.write(run.args.out, rows, "source_row")
        run.write(run.args.dropped, dropped, "dropped_row")


def read(raw: Path, settings: ReadSettings) -> tuple[list[dict], list[dict]]:
    """Return the cells of a raw file that hold a text, and those that do not, with the reason."""
    rows, dropped = [], []
    for speech in read_speeches(raw, settings.adapter, settings.columns):
        place = {"source": settings.source, "source_row": speech.row}
        if fault := text_fault(speech.text):
            dropped.append({**place, "reason": fault[0], "detail": fault[1]})
        else:
            rows.append({**place, "source_key": speech.key, "text": speech.text, "topic_label": speech.topic})
    return rows, dropped


if __name__ == "__main__":
    main()
