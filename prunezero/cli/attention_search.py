"""`prunezero search` in a space of keys in a cache: two objectives, and a front for a winner.

The folder, the journal, `--resume` and MLflow are those of every search.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunezero.cli import search_setup
from prunezero.cli.tables import console, say, say_about, waiting

if TYPE_CHECKING:
    from prunezero.report.tracking.tracker import Tracker
    from prunezero.searching.attending.search import Found, Tried
    from prunezero.searching.attending.session import AttentionSession
    from prunezero.searching.experiment.config import SearchConfig

Rows = list[dict[str, Any]]


def search_keys(
    config: SearchConfig,
    tracker: Tracker,
    folder: Path,
    *,
    threads: int | None,
    resume: bool,
    limits: tuple[int | None, float | None],
) -> Rows:
    """Search, then compare the front with published recipes; no rows where it was interrupted.

    Args:
        threads: to compute with; None leaves it to torch.
        limits: recipes whose KL is measured, and seconds.
    """
    from prunezero.report.tracking.key_records import tracked_attention

    search_setup.pool_of(1, threads, None)
    session = _opened(config, folder, resume=resume)
    name = folder.name
    try:
        tracker.record(tracked_attention(session, name, finished=False))
        try:
            return _run(session, tracker, folder, limits)
        finally:
            tracker.record(tracked_attention(session, name, finished=True, folder=folder))
    finally:
        session.journal.close()


def _opened(config: SearchConfig, folder: Path, *, resume: bool) -> AttentionSession:
    from prunezero.pruning.key_rows import kept_share
    from prunezero.pruning.prompts import PromptSizes
    from prunezero.pruning.testbed import set_up
    from prunezero.report.runs.search_file import forget_config, write_config
    from prunezero.searching.attending.session import open_session

    # Refused before a model is loaded.
    kept_share(config.sparsity)
    PromptSizes.of(config.sequence_length)
    with waiting(f"loading {config.model} and {config.text} text"):
        testbed = set_up(
            config.model, config.text, config.settings, dtype=config.dtype, device=config.device
        )
    say_about([testbed])
    settled = config.settled(testbed)
    opened = partial(write_config, settled, folder)
    try:
        return open_session(testbed, settled, folder, resume=resume, opened=opened)
    except BaseException:
        forget_config(folder)
        raise


def _run(
    session: AttentionSession,
    tracker: Tracker,
    folder: Path,
    limits: tuple[int | None, float | None],
) -> Rows:
    from prunezero.cli.attention_tables import print_front
    from prunezero.report.runs.attention_run import write_candidates, write_front, write_results
    from prunezero.report.tracking.key_records import tracked_finals

    found, was_interrupted = _searched(session, tracker, folder, limits)
    recipes = session.front(found, folder.name)
    write_candidates(found, folder)
    write_front(recipes, folder)
    say(f"{found.proposed} proposed, {len(found.tried)} screened, {len(found.measured)} measured")
    if was_interrupted:
        say(search_setup.kept(folder, *limits))
        return []
    with waiting("comparing the front with published recipes on validation text"):
        rows = session.validated(recipes)
    write_results(found, rows, session.config, folder)
    for record in tracked_finals(rows, recipes, session, folder):
        tracker.record(record)
    print_front(rows)
    say(f"recipes of the front: {folder / 'front'}; compare them by --recipes")
    return rows


def _searched(
    session: AttentionSession,
    tracker: Tracker,
    folder: Path,
    limits: tuple[int | None, float | None],
) -> tuple[Found, bool]:
    """What was found, and whether somebody stopped it."""
    from prunezero.cli.stopping import Stopping
    from prunezero.report.tracking.key_records import attention_key, tracked_tried

    best: dict[str, float] = {}
    measured = 0

    def told(tried: Tried) -> None:
        nonlocal measured
        if not tried.kl:
            return
        measured += 1
        for text, value in tried.kl.items():
            best[text] = min(value, best.get(text, value))
        _say(tried, measured)
        tracker.record(tracked_tried(tried, session, folder.name))
        points = {f"best_{text}_kl": value for text, value in best.items()}
        tracker.progress(attention_key(session, folder.name), measured, points)

    candidates, seconds = limits
    with waiting("reading prompts"), Stopping(seconds, say) as stopping:
        found = session.searched(candidates, told, stopping)
    return found, stopping.was_interrupted


def _say(tried: Tried, measured: int) -> None:
    kls = "  ".join(f"{text} {value:.4f}" for text, value in tried.kl.items())
    console.print(
        f"{measured:4d}  {tried.origin:<6}  KL {kls}  {tried.recipe.criterion.text}",
        soft_wrap=True,
        highlight=False,
    )
