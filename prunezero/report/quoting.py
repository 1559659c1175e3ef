"""Text of others inside a language of ours: one function for each, which says it in full there.

Names, sources and patterns of recipes are any text at all. What has no shape of its own on a page
(control and other invisible characters, halves of surrogate pairs) is spelled by its code.
"""

from __future__ import annotations

import re


def visible(text: str) -> str:
    """The text with each character that shows nothing, line ends too, spelled as in Python."""
    return "".join(letter if letter.isprintable() else _code(letter) for letter in text)


def one_line(text: object) -> str:
    """The text on one line: any run of space is one space, and what shows nothing is spelled."""
    return visible(" ".join(str(text).split()))


def python_string(text: str) -> str:
    r"""A literal of Python in double quotes, whose value is the text.

    Backslashes are doubled and codes such as `\u202e` stand for what shows nothing, so a page looks
    like what it means.
    """
    letters = {"\\": r"\\", '"': r"\""}
    return '"' + "".join(letters.get(letter) or visible(letter) for letter in text) + '"'


def python_strings(texts: tuple[str, ...]) -> str:
    """A list of such literals."""
    return f"[{', '.join(map(python_string, texts))}]"


def python_docstring(text: str) -> str:
    """What stands between triple quotes so that the docstring is the text; line ends stay."""
    lines = text.split("\n")
    spelled = "\n".join(visible(line.replace("\\", r"\\")) for line in lines)
    # Neither three quotes in a row nor one at the end.
    return re.sub(r'"(?="")|"\Z', r"\"", spelled)


def markdown_text(text: object) -> str:
    """Text inside a line or a cell that Markdown, with HTML and formulas in it, shows as it is."""
    return re.sub(r"([\\`*_\[\]<>#|~&$])", r"\\\1", one_line(text))


def markdown_code(text: object) -> str:
    """A span of code, in as many backticks as the text does not hold."""
    line = one_line(text)
    ticks = _fence(line, shortest=1)
    space = " " if line[:1] in ("`", " ", "") or line[-1:] in ("`", " ") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def markdown_block(text: str, language: str) -> str:
    """A block of code, line by line, behind a fence longer than any inside."""
    ticks = _fence(text, shortest=3)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _fence(text: str, *, shortest: int) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(shortest, longest + 1)


_LATEX = {letter: rf"\{letter}" for letter in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}


def latex_text(text: object) -> str:
    """Text of a paragraph or cell of LaTeX."""
    return "".join(_LATEX.get(letter, letter) for letter in one_line(text))


def picture_text(text: object) -> str:
    """Words on a picture of matplotlib, which takes what stands between dollars for a formula.

    Letters that its font lacks, of which it would warn, are replacement characters.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    shown = "".join(letter if ord(letter) in known else "\ufffd" for letter in one_line(text))
    return shown.replace("$", r"\$")


def _code(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
