"""The commands: search, show, verify, compare, prune, plan, export, list, ui, doctor.

Each command is one module beside this one; here they are gathered, behind the guard that all share.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import typer

from prunezero.cli.compare import compare
from prunezero.cli.doctor import doctor
from prunezero.cli.export import export
from prunezero.cli.guard import guarded, say_aside
from prunezero.cli.listing import list_
from prunezero.cli.plan import plan
from prunezero.cli.prune import prune
from prunezero.cli.search import search
from prunezero.cli.show import show
from prunezero.cli.transfer import transfer
from prunezero.cli.ui import ui
from prunezero.cli.verify import verify
from prunezero.errors import PruneZeroWarning

app = typer.Typer(
    name="prunezero",
    help="Search for the formula that prunes your language model best.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(search)
app.command()(show)
app.command()(verify)
app.command()(compare)
app.command()(transfer)
app.command()(prune)
app.command()(plan)
app.command()(export)
app.command(name="list")(list_)
app.command()(ui)
app.command()(doctor)


def main() -> None:
    """Run the command line; exit code 1 for a mistake that the user can mend."""
    with guarded():
        _quiet_libraries()
        warnings.showwarning = _one_sentence(warnings.showwarning)
        app()


def _one_sentence(otherwise: Callable[..., None]) -> Callable[..., None]:
    """How a warning is shown: ours as one sentence, others as before."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, PruneZeroWarning):
            say_aside(str(message))
        else:
            otherwise(message, category, *where, **more)

    return show


def _quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice out of our output."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }.items():
        os.environ.setdefault(name, value)
