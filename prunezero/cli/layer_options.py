"""Which layers a command prunes: the same two options, read alike, wherever recipes are applied."""

from __future__ import annotations

from typing import Annotated

import typer

TARGETS = typer.Option(
    help="Layers to prune: names, endings or re:PATTERN, by commas; in place of those that a "
    "recipe names."
)
IGNORE = typer.Option(help="Layers to leave alone, written likewise.")
Targets = Annotated[str, TARGETS]
Ignore = Annotated[str, IGNORE]
