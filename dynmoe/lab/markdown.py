"""Text in tables of Markdown."""


def cell(text: str) -> str:
    """Text for a cell of a table; what stands between backticks is code."""
    pieces = text.replace("|", r"\|").split("`")
    pieces[::2] = [prose.replace("<", "&lt;").replace("*", r"\*") for prose in pieces[::2]]
    return "`".join(pieces)
