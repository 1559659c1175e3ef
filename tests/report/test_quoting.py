"""Whatever a recipe is called stays a word, in every language that the word is put into."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from prunezero.errors import ModelError
from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.patterns import fits
from prunezero.report.export.card import model_card
from prunezero.report.export.kernel import kernel_page
from prunezero.report.export.page import pruner_page
from prunezero.report.plots.plots import pareto, progress
from prunezero.report.quoting import (
    latex_text,
    markdown_block,
    markdown_code,
    markdown_text,
    one_line,
    picture_text,
    python_docstring,
    python_string,
)
from tests.report.hostile import HOSTILE
from tests.report.recipes import recipe_of

PATTERNS = (
    *HOSTILE,
    *(f"re:{words}" for words in HOSTILE),
    "re:(?x) q_ # the rest is a remark\n proj",
    r"re:(?P<part>[a-z])_(?P=part)|(.)\2",
    r"re:\Alayers\.0\b",
    're:"""|q',
)
NAMES = ("layers.0.q_proj", "layers.0.mlp.up", *HOSTILE, *(f"a.{words}" for words in HOSTILE))


def invisible(text: str) -> set[str]:
    return {letter for letter in text if not letter.isprintable()}


@pytest.mark.parametrize("words", HOSTILE)
def test_literals_and_docstrings_of_python_mean_the_words(words: str) -> None:
    literal = python_string(words)
    assert ast.literal_eval(literal) == words and not invisible(literal)
    docstring = f'"""{python_docstring(words)}"""'
    assert ast.literal_eval(docstring) == words and invisible(docstring) <= {"\n"}
    docstring.encode("utf-8")


@pytest.mark.parametrize("words", HOSTILE)
def test_markdown_shows_the_words(words: str) -> None:
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown = one_line(words)
    row, code = f"| a | b |\n| --- | --- |\n| x | {markdown_text(words)} |", markdown_code(words)
    cells = [one for one in markdown.parse(row) if one.type == "inline"]
    assert plain(cells[-1]) == shown
    (span,) = markdown.parseInline(code)[0].children or []
    assert (span.type, span.content) == ("code_inline", shown)
    tokens = markdown.parse(markdown_block(words, "yaml"))
    assert [one.type for one in tokens] == ["fence"]
    heading = markdown.parse(f"# {markdown_text(words)}, pruned")
    assert [one.type for one in heading] == ["heading_open", "inline", "heading_close"]
    assert plain(heading[1]) == f"{shown}, pruned"


def plain(inline: Any) -> str:
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    return "".join(child.content for child in inline.children)


def test_latex_and_pictures_read_no_formula_into_words() -> None:
    from matplotlib.cbook import is_math_text

    assert latex_text("50% of a_b & \\x{1}^2~<c>") == (
        r"50\% of a\_b \& \textbackslash{}x\{1\}\textasciicircum{}2\textasciitilde{}"
        r"\textless{}c\textgreater{}"
    )
    assert latex_text("two\n\nlines") == "two lines"
    assert is_math_text("$x_1$") and picture_text("a\nb") == "a b"
    assert not any(is_math_text(picture_text(words)) for words in HOSTILE)


def test_pictures_are_drawn_with_any_name(tmp_path: Path) -> None:
    names = ["$\\frac{", "two\nlines $x$", "日本 \x00", "\\$a$"]
    row = {"slot": 1, "complexity": 3, "signal": "none", "formula": "abs(W)"}
    rows = [row | {"search_perplexity": 20.0}]
    named = [
        row | {"name": name, "search_perplexity": 21.0 + 40 * place}
        for place, name in enumerate(names)
    ]
    pareto(rows, named, tmp_path / "pareto.png")
    progress(rows, named, tmp_path / "progress.png")
    assert (tmp_path / "pareto.png").stat().st_size > 1000


@pytest.mark.parametrize("words", HOSTILE)
def test_a_page_with_any_name_is_python_and_says_the_name(words: str) -> None:
    criterion = Criterion.parse("abs(W)*X")
    measured = {"recipe": words, "sparsity": 0.5, "pattern": "free", "seed": 0, "draws": 1}
    measured |= {"sequence_length": 128, "calibration_tokens": 1024}
    # No file can hold some of these words; a page has to be safe all the same.
    fields = recipe_of("w", criterion).model_copy(
        update={
            "name": words,
            "source": words,
            "targets": (words,),
            "provenance": {"measured": [measured]},
        }
    )
    for page, times in ((pruner_page(fields), 3), (kernel_page(fields), 2)):
        tree = ast.parse(page)
        modules = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
        assert "os" not in {alias.name for node in modules for alias in node.names}
        assert invisible(page) <= {"\n"} and page.encode("utf-8")
        told = " ".join((ast.get_docstring(tree) or "").split())
        assert told.count(" ".join(words.split())) >= times


def page_of(folder: Path, **fields: Any) -> Any:
    (folder / "pruner.py").write_text(
        pruner_page(recipe_of("w", Criterion.parse("abs(W)")).model_copy(update=fields)),
        encoding="utf-8",
    )
    specification = importlib.util.spec_from_file_location("pruner", folder / "pruner.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def meaning(match: Any, pattern: str, refusal: type[Exception]) -> list[bool]:
    """Which names a pattern means; an empty list where it is no regular expression."""
    try:
        return [match(pattern, name) for name in NAMES]
    except refusal:
        return []


def test_a_page_means_the_same_layers_by_every_pattern(tmp_path: Path) -> None:
    own = {pattern: Criterion.parse("abs(W)*2") for pattern in PATTERNS}
    page = page_of(tmp_path, targets=PATTERNS, ignore=PATTERNS[::-1], criteria=own)
    assert page.TARGETS == page.OWN == page.IGNORE[::-1] == list(PATTERNS)
    means = [meaning(fits, pattern, ModelError) for pattern in PATTERNS]
    assert means == [meaning(page.fits, pattern, page.RefusalError) for pattern in PATTERNS]
    assert [] in means and all(map(any, means[-4:]))


def test_a_page_gives_an_endless_expression_no_more_time_than_the_engine(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    with pytest.raises(page.RefusalError, match="takes too long on model.layers.0"):
        page.fits("re:^(([a-z_.0-9])+)+!", "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("words", HOSTILE)
def test_a_card_with_any_name_keeps_its_parts(words: str) -> None:
    criterion = Criterion.parse("abs(W)*X")
    recipe = f"name: {words!r}\nnote: |\n  ```\n  # x\n"
    row = {"model": words, "method": words, "sparsity": 0.5}
    card = model_card(
        words, criterion, [row], criteria={words: criterion}, recipe=recipe, license_id=words
    )
    _, front, body = f"\n{card}".split("\n---\n", 2)
    assert yaml.safe_load(front)["license"] == words
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    headings = [tokens[i + 1] for i, one in enumerate(tokens) if one.type == "heading_open"]
    assert [one.content for one in headings[1:]] == ["Results", "Recipe"]
    assert headings[0].content.endswith(", pruned")
    assert [one.content for one in tokens if one.type == "fence"] == [recipe]
    assert sum(one.type == "td_open" for one in tokens) == 3
