"""The one normal form of a client's words, and the id that is made from it."""

import hashlib
import re
import unicodedata
from html.parser import HTMLParser

BLOCK_TAGS = "blockquote|br|caption|center|dd|div|dl|dt|h[1-6]|hr|li|ol|p|pre|section|table|tbody|td|th|thead|tr|ul"
INLINE_TAGS = (
    "a|abbr|b|big|body|code|del|em|font|head|html|i|img|ins|mark|meta|s|script|small|span|strike|strong|style|sub|sup|title|tt|u|xml"
)

# Where "<" and "&" are markup. Elsewhere they are a client's own signs (a < b, <3, </3, <sigh>, <I cry>, R&D) and no parser may take them.
MARKUP = rf"/?(?:{BLOCK_TAGS}|{INLINE_TAGS}|[ovw]:\w+)(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>|!--.*?-->"
REFERENCE = r"#\d+;|#x[0-9a-f]+;|[a-z][a-z0-9]*;|(?:amp|lt|gt|quot|nbsp)\b"
OWN_ANGLE = re.compile(rf"<(?!{MARKUP})", re.IGNORECASE | re.DOTALL)
OWN_AMPERSAND = re.compile(rf"&(?!{REFERENCE})", re.IGNORECASE)

# Control characters that are no white space, zero-width space, word joiner, byte-order mark, soft hyphen, marks of direction. Joiners
# (U+200C, U+200D) stay: words and emoji need them.
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\u00ad\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def normalise(text: str) -> str:
    """Return the text in Unicode NFC, entities unescaped, HTML tags removed, white space collapsed; a fixed point of itself.

    Repeated until nothing changes, since an unescaped "&lt;p&gt;" is a tag again: some sources were escaped twice.
    """
    previous = None
    while text != previous:
        previous = text
        if "<" in text or "&" in text:
            text = without_markup(text)
        text = unicodedata.normalize("NFC", " ".join(INVISIBLE.sub("", text).split()))
    return text


def without_markup(text: str) -> str:
    """Remove HTML tags and comments and unescape entities, once; a block's tag leaves a space."""
    parser = TextOnly(convert_charrefs=True)
    parser.feed(OWN_ANGLE.sub("&lt;", OWN_AMPERSAND.sub("&amp;", text)))
    parser.close()
    return "".join(parser.parts)


class TextOnly(HTMLParser):
    """Collects the text of an HTML fragment."""

    def __init__(self, *, convert_charrefs: bool) -> None:
        super().__init__(convert_charrefs=convert_charrefs)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        """Keep text."""
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """Part the words on either side of a block."""
        if re.fullmatch(BLOCK_TAGS, tag):
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        """Do as for the start of a block."""
        self.handle_starttag(tag, [])


def speech_id(normalised: str) -> str:
    """Return the id of a speech: the first 16 hex digits of the SHA-256 of its normalised text."""
    return hashlib.sha256(normalised.encode()).hexdigest()[:16]
