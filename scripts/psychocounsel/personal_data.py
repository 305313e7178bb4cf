"""Masks what leads to a person in a client's words: e-mail addresses, telephone numbers, addresses of web pages.

Web addresses are found by linkify-it, telephone numbers by Google's libphonenumber, both with the care that these libraries take for
what only looks like one (dates, money, ranges of years, a full stop without a space after it). What is left as it stands:

- names of people and places, for which no reliable tool fits into this project: a source's own anonymisation is all there is;
- toll-free and other service numbers and short codes (988, 1-800-273-8255, 116 123), which are those of help lines, not of people;
- numbers without a country code that are no valid North American ones, and addresses that are written out ("name at site dot com").
"""

import re
from collections import Counter
from functools import cache

import phonenumbers
from linkify_it import LinkifyIt
from phonenumbers import PhoneNumberMatcher, PhoneNumberType

TOKENS = {"url": "[url]", "email": "[email]", "phone": "[phone]"}  # in the order in which they are looked for

# Whatever has an "@" between words with a dotted name after it: a library would know the top-level domains of its day alone.
EMAIL = re.compile(r"[^\s@<>()\[\],;:\"]{1,64}@(?:[^\W_](?:[\w-]*\w)?\.)+(?:[^\W\d_]{2,}|xn--[\w-]*\w)")
MAY_BE_URL = re.compile(r"\w\.\w|//")
MAY_BE_PHONE = re.compile(r"(?:\d\D{0,3}){7}")  # the shortest number with an area code has more digits
LETTER_AT_DIGIT = re.compile(r"(?<=\d)[^\W\d_]|[^\W\d_](?=\d)")  # libphonenumber finds no number that touches a word
COUNTRY = "US"  # of numbers without a country code

# A domain alone counts by a name that no sentence begins with: "him.My" and "so.Is" are sentences without a space between them.
BARE_DOMAIN = re.compile(r"\.(?:com|org|net|edu|gov|mil|info|biz)$|\.(?:co|com|org|net|ac|gov|edu)\.[a-z]{2}$", re.IGNORECASE)
OF_SERVICES = (
    PhoneNumberType.TOLL_FREE,
    PhoneNumberType.PREMIUM_RATE,
    PhoneNumberType.SHARED_COST,
    PhoneNumberType.UAN,
)


def mask(text: str) -> tuple[str, dict[str, int]]:
    """Return the text with [url], [email] and [phone] in place of such, and how many there were of each kind; a fixed point of itself.

    Repeated until nothing changes, since one that is masked may part another from what hid it.
    """
    found, previous = Counter(), None
    while text != previous:
        previous = text
        for kind, token in TOKENS.items():
            for start, end in reversed(FINDERS[kind](text)):
                text = text[:start] + token + text[end:]
                found[kind] += 1
    return text, dict(sorted(found.items()))


def urls(text: str) -> list[tuple[int, int]]:
    """Return where addresses of web pages stand."""
    matches = linkify().match(text) or [] if MAY_BE_URL.search(text) else []
    return [(match.index, match.last_index) for match in matches if match.schema != "mailto:" and is_address(match.schema, match.raw)]


def is_address(schema: str, raw: str) -> bool:
    """Whether what linkify-it takes for a link is one, and not two sentences without a space between them."""
    host, slash, path = raw.partition("/")
    return bool(schema or "www." in host.lower() or BARE_DOMAIN.search(host) or (slash and path and host.islower()))


def emails(text: str) -> list[tuple[int, int]]:
    """Return where e-mail addresses stand."""
    return [match.span() for match in EMAIL.finditer(text)] if "@" in text else []


def phones(text: str) -> list[tuple[int, int]]:
    """Return where telephone numbers of people stand."""
    matches = PhoneNumberMatcher(LETTER_AT_DIGIT.sub(" ", text), COUNTRY) if MAY_BE_PHONE.search(text) else []
    return [(match.start, match.end) for match in matches if is_of_a_person(match)]


def is_of_a_person(match: phonenumbers.PhoneNumberMatch) -> bool:
    """Whether a telephone number is no service's, and not a list of small numbers (1 2 3 4 5 6 7 8 9 10)."""
    counting = sum(len(group) == 1 for group in re.findall(r"\d+", match.raw_string)) > 1
    return not counting and phonenumbers.number_type(match.number) not in OF_SERVICES


FINDERS = {"url": urls, "email": emails, "phone": phones}


@cache
def linkify() -> LinkifyIt:
    """Return the finder of links."""
    return LinkifyIt()
