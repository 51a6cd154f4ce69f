"""Formulas as MathML, which browsers render themselves: read as TeX at build time, nothing is loaded from elsewhere."""

import html
import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

DOUBLE_STRUCK = dict(zip("CENPRZ", "\u2102\U0001d53c\u2115\u2119\u211d\u2124"))
SCRIPT = {letter: chr(0x1D49C + ord(letter) - ord("A")) for letter in "ACDGJKNOPQSTUVWXYZ"}
SCRIPT |= dict(zip("BEFHILMR", "\u212c\u2130\u2131\u210b\u2110\u2112\u2133\u211b"))
ALPHABETS = {"double-struck": DOUBLE_STRUCK, "script": SCRIPT}  # browsers know mathvariant="normal" alone


def mathml(tex: str, display: str = "inline") -> str:
    """The formula ``tex`` as MathML; letters of another alphabet as the characters that they are.

    Raises :class:`ValueError` for a command that is not known.
    """
    markup = convert(tex, display=display)
    markup = re.sub(r"&#x([0-9A-F]+);", lambda m: html.escape(chr(int(m[1], 16))), markup)
    for alphabet, letters in ALPHABETS.items():
        pattern = rf'<mi mathvariant="{alphabet}">(\w)</mi>'
        markup = re.sub(pattern, lambda m, letters=letters: f"<mi>{letters[m[1]]}</mi>", markup)
    unread = re.search(r"\\\w+", re.sub(r"<[^>]*>", "", markup))
    if unread or "merror" in markup or "mathvariant=" in markup.replace('mathvariant="normal"', ""):
        raise ValueError(f"formula {tex!r} is not read as TeX: {unread[0] if unread else markup}")
    return markup


def inline(self, node):
    """In a line of text."""
    self.body.append(mathml(node.astext()))
    raise SkipNode


def block(self, node):
    """On a line of its own, which scrolls where it is wider than the page."""
    self.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>')
    raise SkipNode
