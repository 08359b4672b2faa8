"""A stranger's words on a card: as plain letters, without markup and without addresses."""

import re

_NOT_IN_A_CELL = re.compile(r"[^\w./-]")  # \w is a letter or digit of any script, or an underscore
_NOT_IN_A_SENTENCE = re.compile(r"[^\w ./,:;()%'-]")


def cell(text: str) -> str:
    """A stranger's text in a Markdown table: a folder's name may hold anything, so only plain letters go through."""
    return _NOT_IN_A_CELL.sub("�", text[:200])


def sentence(text: str) -> str:
    """A sentence with a stranger's words in it: letters, digits and points, but no markup and no address."""
    return _NOT_IN_A_SENTENCE.sub("�", text[:500]).replace("://", "�")
