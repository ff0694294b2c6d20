"""Tables for a paper: LaTeX with the rules of booktabs."""

from __future__ import annotations

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "_": r"\_", "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
}  # fmt: skip
"""Signs that LaTeX takes for commands, or sets as others."""


def escape(text: str) -> str:
    """A text that LaTeX sets as it stands."""
    return "".join(SPECIAL.get(sign, sign) for sign in text)


def booktabs(rows: list[list[str]], caption: str) -> str:
    r"""A table environment: the first row has the headings, the first column stands to the left.

    It needs `\usepackage{booktabs}` and, for quotation marks, `\usepackage[T1]{fontenc}`.

    Args:
        rows: of equal length, plain texts.
        caption: plain text.
    """
    head, *body = [[escape(row[0]), *map(_number, row[1:])] for row in rows]
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{escape(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", _line(head), r"\midrule",
        *map(_line, body), r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    # An opening bracket after \\ would be read as its option.
    return " & ".join(f"{{}}{c}" if c.startswith("[") else c for c in cells) + r" \\"


def _number(text: str) -> str:
    """A cell, with the minus signs of its numbers as such."""
    cells = escape(text)
    if not text.strip("-+0123456789.,[] %"):
        return cells.replace("-", "$-$")
    return cells
