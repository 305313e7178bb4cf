"""What names of the Hub and files without a checksum stood for on the day that `make pin` resolved them (config/pins.lock.yaml).

The registries say what is known of a name; the lock file adds what they leave null and contradicts nothing: a revision or a
sha256 in a registry wins, and a pin that was made of another revision or another file does not count.
"""

from pathlib import Path

CODE_VERSION = 1  # what it adds to the registries stands in the settings of the programs

HUB = "https://huggingface.co"


def location(source: dict) -> str:
    """Return the name by which the lock file knows a source's file: on the Hub, at its address, or below the source cache."""
    if "hub" in source:
        return f"hf://datasets/{source['hub']['repository']}/{source['hub']['path']}"
    return source.get("address") or source.get("file") or source["path"]


def hub_address(repository: str, path: str, revision: str | None) -> str:
    """Return the address of a data set's file on the Hub, at a commit or, without one, as it is on the day."""
    return f"{HUB}/datasets/{repository}/resolve/{revision or 'main'}/{path}"


def pin_models(models: dict[str, dict], pins: dict[str, str]) -> None:
    """Give models without a revision the commit that the lock file has for their id."""
    for entry in models.values():
        if entry.get("revision") is None and entry["id"] in pins:
            entry["revision"] = pins[entry["id"]]


def pin_sources(sources: dict[str, dict], pins: dict[str, dict]) -> None:
    """Give sources without a revision or a sha256 those of the lock file, and sources of the Hub the address that follows."""
    for entry in sources.values():
        pin = {key: value for key, value in pins.get(location(entry), {}).items() if value}
        if all(entry.get(key) in (None, value) for key, value in pin.items()):
            entry.update(pin)
        if "hub" in entry:
            entry["address"] = hub_address(entry["hub"]["repository"], entry["hub"]["path"], entry.get("revision"))


def is_unpinned_model(entry: dict, endpoints: dict[str, dict]) -> bool:
    """Whether a model is loaded from the Hub by a name that may mean something else tomorrow; an API's id carries its snapshot."""
    ours = "weights" in entry or "path" in entry
    loaded = entry["kind"] != "chat" or endpoints[entry["endpoint"]]["kind"] == "serve"
    return loaded and not ours and entry.get("revision") is None


def is_unpinned_source(entry: dict) -> bool:
    """Whether nothing says which bytes a source's file has; a file of one's own (`path`) counts by its content."""
    own = "path" in entry and Path(entry["path"]).is_file()
    return entry.get("sha256") is None and not own
