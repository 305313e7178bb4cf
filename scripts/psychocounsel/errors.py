"""Errors that a user can mend: shown as one message, without a traceback."""

from difflib import get_close_matches

CODE_VERSION = 1  # counts in code fingerprints instead of this module's text (see fingerprint.py)


class UserError(Exception):
    """Something in the config, an input file or the environment is wrong; the message says what, where and what to do."""


def nearest(name: object, allowed: list[str]) -> str:
    """Return " Did you mean 'x'?" for a likely typo, else an empty string."""
    matches = get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def nearest_or_all(name: object, allowed: list[str]) -> str:
    """Return the nearest allowed name as a hint, or all of them."""
    return nearest(name, allowed) or (f" Allowed: {', '.join(sorted(allowed))}." if allowed else " There is none.")
