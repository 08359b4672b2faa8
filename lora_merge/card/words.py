"""A stranger's words on a card: as plain letters, without markup and without addresses."""


def cell(text: str) -> str:
    """A stranger's text in a Markdown table: a folder's name may hold anything, so only plain letters go through."""
    return "".join(char if char.isalnum() or char in "._-/" else "�" for char in text[:200])


def sentence(text: str) -> str:
    """A sentence with a stranger's words in it: letters, digits and points, but no markup and no address."""
    plain = "".join(char if char.isalnum() or char in " ._-/,:;()%'" else "�" for char in text[:500])
    return plain.replace("://", "�")
