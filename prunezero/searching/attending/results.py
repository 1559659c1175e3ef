"""Results of a search for criteria of keys, by kind and key: from its journal, or measured now.

To go on after a cut the search runs again from its start and finds here what it would measure, so
its end cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from prunezero.searching.evaluation.journal import Journal

Result = dict[str, Any]


class Results:
    """Results that are kept in a journal or, without one, in memory alone."""

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self._known: dict[tuple[str, str], Result] = {}

    def result(self, kind: str, key: str, measure: Callable[[], Result]) -> Result:
        """What stands under kind and key; measured now, and on disk before it is returned, if new.

        Raises:
            OutputError: the journal cannot be written.
        """
        before = self._found(kind, key)
        if before is not None:
            return before
        # As it is read back: with sorted keys, and lists for tuples.
        found = json.loads(json.dumps(measure(), sort_keys=True))
        if self._journal is not None:
            return self._journal.write(kind, key, found)
        self._known[kind, key] = found
        return found

    def _found(self, kind: str, key: str) -> Result | None:
        if self._journal is not None:
            return self._journal.known(kind, key)
        return self._known.get((kind, key))
