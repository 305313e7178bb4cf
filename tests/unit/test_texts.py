"""The normal form of a client's words: what it removes, what it must leave, and that it is a fixed point."""

import hashlib
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from psychocounsel.texts import normalise, speech_id

MARKUP = st.sampled_from(
    [
        "<p>",
        "</p>",
        "<br/>",
        "&lt;",
        "&amp;",
        "&nbsp;",
        "&#39;",
        "&",
        "<",
        ">",
        "<b",
        "<a href='x'>",
        "<!--",
        "-->",
        " ",
        "\u200b",
        "e\u0301",
        "amp;",
    ]
)


@pytest.mark.parametrize(
    "words",
    [
        "a < b and c > d",
        "I <3 you",
        "</3 broken",
        "<sigh> I am tired",
        "<I cry a lot>",
        "R&D and AT&T",
        "x<y",
        "do&nothing",
        "<b",
        "<!-- no end",
    ],
)
def test_own_signs_survive(words):
    assert normalise(words) == words


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("<p>One</p><p>two</p>", "One two"),
        ("<b>bo</b>ld", "bold"),
        ('<a href="http://x" title="a>b">link</a>', "link"),
        ("line<br>line<BR />line", "line line line"),
        ("it&#39;s &quot;me&quot; &amp; you", 'it\'s "me" & you'),
        ("&lt;p&gt;twice&lt;/p&gt; escaped", "twice escaped"),
        ("no\u00a0break\u2003space\r\n\tand\u200b zero\ufeff", "no break space and zero"),
        ("con\x00trol\x1b \x9fsigns and \u202emarks\u2069\x85of lines", "control signs and marks of lines"),
        ("cafe\u0301", "café"),
        ("a <!-- hidden --> comment", "a comment"),
        ("<o:p>Word</o:p>", "Word"),
        ("  ", ""),
    ],
)
def test_cleaned(raw, clean):
    assert normalise(raw) == clean


@given(st.one_of(st.text(), st.lists(st.one_of(MARKUP, st.text(max_size=3)), max_size=25).map("".join)))
@example("&amp;amp;lt;b&amp;gt;")
@example("<<b>b>x</b>")
@example("<script>a &lt; b</p>")
def test_is_a_fixed_point(text):
    once = normalise(text)
    assert normalise(once) == once
    assert once == " ".join(once.split())
    assert unicodedata.is_normalized("NFC", once)


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "Zs"], exclude_characters="<&"), max_size=200))
def test_plain_text_loses_nothing_but_white_space(text):
    assert normalise(text).replace(" ", "") == "".join(unicodedata.normalize("NFC", text).split())


def test_id_is_of_the_text():
    assert speech_id("I am tired.") == hashlib.sha256(b"I am tired.").hexdigest()[:16]
