"""What changed since a file was made, in people's words: its record's settings, code and inputs against the present ones."""

from psychocounsel.records import canonical_json

CODE_VERSION = 1  # tells of changes and makes no result

LONGEST = 80  # characters of an old and a new value; of longer ones only that they changed is said
ABSENT = object()  # the value of a key that is not there


def changed_settings(old: dict, new: dict) -> list[str]:
    """Return a phrase for each difference: "temperature of llama-3.1-8b-instruct: 0.7 -> 0.9", "principle 'clarity' changed: name"."""
    return _changed_mapping(old, new, owner=None)


def changed_code(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Return a phrase for the files of a program whose fingerprints differ, and one for those that it has gained or lost."""
    found = {
        "code of {} changed": [file for file in new if file in old and new[file] != old[file]],
        "its program now uses {}": sorted(new.keys() - old.keys()),
        "its program no longer uses {}": sorted(old.keys() - new.keys()),
    }
    return [phrase.format(", ".join(files)) for phrase, files in found.items() if files]


def _changed_mapping(old: dict, new: dict, owner: str | None) -> list[str]:
    owner = _name(new, "name", "id") or owner
    return [phrase for key in sorted({*old, *new}) for phrase in _changed_value(key, old.get(key, ABSENT), new.get(key, ABSENT), owner)]


def _changed_value(key: str, old: object, new: object, owner: str | None) -> list[str]:
    """Return the phrases for one key, whose values may be equal; owner is the nearest thing around it that has a name."""
    where = f"{key} of {owner}" if owner else key
    if _same(old, new):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        names = [_name(value, "name", "id") for value in (old, new)]
        return _changed_mapping(old, new, owner or key) if names[0] == names[1] else [f"{where}: {names[0]} -> {names[1]}"]
    if isinstance(old, list) and isinstance(new, list):
        return _changed_list(key, where, old, new)
    values = f"{_shown(old)} -> {_shown(new)}"
    return [f"{where} changed" if len(values) > LONGEST or "\n" in values else f"{where}: {values}"]


def _changed_list(key: str, where: str, old: list, new: list) -> list[str]:
    """Return the phrases for a list: what was added, removed, or changed under its name, or else that the order did."""
    was, now = _by_name(old), _by_name(new)
    if any(len(name) > LONGEST for name in was.keys() ^ now.keys()):
        return [f"{where} changed"]
    of_mappings = all(isinstance(item, dict) for item in [*old, *new])
    shown = {name: f"{key.removesuffix('s')} {name!r}" if of_mappings else f"{where}: {name}" for name in {*was, *now}}
    phrases = [f"{shown[name]} added" for name in now if name not in was]
    phrases += [f"{shown[name]} removed" for name in was if name not in now]
    for name in now:
        if name in was and not _same(was[name], now[name]):
            keys = sorted({*was[name], *now[name]})
            differing = [key for key in keys if not _same(was[name].get(key, ABSENT), now[name].get(key, ABSENT))]
            phrases.append(f"{shown[name]} changed: {', '.join(differing)}")
    return phrases or [f"{where}: another order or number"]


def _by_name(items: list) -> dict[str, object]:
    """Return the items of a list by their ids, names or titles; an item without one names itself."""
    return {_name(item, "id", "name", "title") or (item if isinstance(item, str) else canonical_json(item)): item for item in items}


def _name(value: object, *keys: str) -> str | None:
    """Return the first of the keys that holds a name."""
    return next((value[key] for key in keys if isinstance(value.get(key), str)), None) if isinstance(value, dict) else None


def _same(old: object, new: object) -> bool:
    """Whether two values are written alike: 1, 1.0 and true are not."""
    return (old is new) if ABSENT in (old, new) else canonical_json(old) == canonical_json(new)


def _shown(value: object) -> str:
    return "not set" if value is ABSENT else "null" if value is None else str(value)
