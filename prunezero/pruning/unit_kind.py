"""UnitKind: all that is particular to one kind of thing that may be removed.

A row of `kinds.py` names functions, and does not hold them: they are found when first called, so
that recipes can be read and listed without torch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prunezero.errors import RecipeError
from prunezero.formula.domains import Domain
from prunezero.pruning.recipes.word_options import Options
from prunezero.scoring.request import group_columns

if TYPE_CHECKING:
    from torch import Tensor

    from prunezero.formula.criterion import Criterion
    from prunezero.models.anatomy.groups import Group
    from prunezero.models.anatomy.linears import Linear
    from prunezero.models.editing.edit import Edit
    from prunezero.models.editing.selection import Selection
    from prunezero.models.loading.language_model import LanguageModel
    from prunezero.pruning.budget import Budget
    from prunezero.scoring.statistics import Statistics
    from prunezero.scoring.tables import Tables


@dataclass(frozen=True)
class UnitKind:
    """One kind of thing that may be removed, and all that is particular to it."""

    word: str
    """as a recipe spells it"""
    meaning: str
    """what one unit is"""
    domain: Domain
    """the table that a formula sees"""
    compare: Mapping[str, tuple[str, ...]]
    """by word of a comparison group, N:M patterns among them: axes of the domain along which the
    units lie that compete"""
    baselines: tuple[str, ...]
    """published recipes that a search over such units is measured against"""
    reference: str
    """the formula that stands for them all where one is enough"""
    finder: str
    """module:function of `groups`"""
    checker: str
    """module:function of `check`"""
    scorer: str
    """module:function of `scores`"""
    selector: str
    """module:function of `select`"""
    editor: str
    """module:name of `edit`"""
    measure: str = "weights"
    """what a share to remove is a share of"""
    options: type[Options] = Options
    """the numbers that go with the word in a recipe"""
    plural: str = ""
    """several of them in a sentence; the word with an s, if left out"""
    whole_model: str = ""
    """why the whole model has to be in memory; nothing where one block at a time is enough"""
    observer: str = ""
    """module:function of `observe`; nothing where linear maps see all that formulas ask for"""
    walker: str = ""
    """module:function of `walk`; nothing where what formulas see is known before any unit is
    chosen"""

    def groups(
        self,
        linears: Sequence[Linear],
        language_model: LanguageModel,
        options: Options | None = None,
    ) -> list[Group]:
        """The groups of such units in some linear maps of a model, in the order of the model.

        What the options say of all groups, the groups say themselves.

        Raises:
            ModelError: there are none, or some linear maps have a part in units of others.
            RecipeError: such units are none of the weights.
        """
        self.refuse_run_time()
        from prunezero.models.anatomy.linears import find_linears

        find: Callable[..., list[Group]] = _found(self.finder)
        blocks = 1 + max(linear.block for linear in find_linears(language_model.model))
        return self.limited(find(linears, language_model), options or self.options(), blocks)

    def refuse_run_time(self) -> None:
        """Refuse to take out of a model what is no part of it.

        Raises:
            RecipeError: such units come and go while the model runs.
        """
        if self.domain.is_run_time:
            raise RecipeError(
                f"unit: {self.word}: nothing is removed from the weights, {self.several} are left "
                "out while the model runs; measure such a recipe by `prunezero compare`, or "
                "install it for a while by prunezero.pruning.attention.keeping"
            )

    def limited(self, groups: Sequence[Group], options: Options, blocks: int) -> list[Group]:
        """The groups of a model of so many blocks, with what the options say of all."""
        limited = [replace(group, **options.limits(group.block, blocks)) for group in groups]
        return [replace(group, multiple_of=_in_units(group)) for group in limited]

    def check(self, groups: Sequence[Group], budget: Budget, *, compare: str) -> None:
        """Refuse a budget that no selection fits, before anything is computed.

        Raises:
            SelectionError: says of which group it asks too much.
        """
        refuse: Callable[..., None] = _found(self.checker)
        refuse(groups, budget, compare=compare)

    def observe(
        self,
        language_model: LanguageModel,
        groups: Sequence[Group],
        windows: Tensor,
        sums: Iterable[str],
        *,
        gone: Sequence[Group] = (),
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, Statistics]:
        """What whole groups do to a model, by their names, where formulas of such units ask that.

        Args:
            windows: calibration token ids `[count, length]`.
            sums: names in `BLOCK_SUMS`, or of experts in `ROUTING_SUMS` or mask_gradients.
            gone: groups that the model does without by then.
            progress: told (what, done, total) as the work goes on.

        Raises:
            StatisticsError: a number is not finite.
        """
        look: Callable[..., dict[str, Statistics]] = _found(self.observer)
        return look(language_model, groups, windows, sums, gone=gone, progress=progress)

    def walk(
        self,
        language_model: LanguageModel,
        groups: Sequence[Group],
        windows: Tensor,
        sums: Iterable[str],
        choose: Callable[[Group, Statistics], Tensor],
        *,
        damping: float,
        is_sequential: bool,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Selection:
        """The units that stay, chosen on a walk through the model, which says what units are.

        Args:
            windows: calibration token ids `[count, length]`.
            sums: names of forward sums of what units hand on.
            choose: which units of a group stay, bool [units], by its sums.
            damping: share of the mean diagonal that is added before a decomposition.
            is_sequential: whether later groups are seen without what went from earlier ones.
            progress: told (what, done, total) as the work goes on.

        Raises:
            StatisticsError: a number is not finite.
        """
        through: Callable[..., Selection] = _found(self.walker)
        numbers = {"damping": damping, "is_sequential": is_sequential, "progress": progress}
        return through(language_model, groups, windows, sums, choose, **numbers)

    def scores(
        self,
        group: Group,
        criterion: Criterion,
        statistics: Mapping[str, Statistics],
        *,
        damping: float,
        options: Options,
        tables: Tables | None = None,
    ) -> Tensor:
        """How much each unit of a group matters, of the group's shape; the lowest go first.

        Args:
            statistics: by the name of a linear map; of what `observe` gives, by that of a group.
            damping: of the features that look at an inverse.
            options: the numbers of the word.
            tables: of one model and one draw of text, where many formulas are asked for.

        Raises:
            ScoreError: a score is NaN or infinite, or all are equal.
            StatisticsError: a sum that the formula needs was not collected.
        """
        value: Callable[..., Tensor] = _found(self.scorer)
        return value(group, criterion, statistics, damping=damping, options=options, tables=tables)

    def select(
        self,
        groups: Sequence[Group],
        scores_of: Callable[[Group], Tensor],
        budget: Budget,
        *,
        compare: str,
    ) -> Selection:
        """The units that stay of groups that have one budget together; lowest scores go.

        A group that an update chooses from, unit after unit while it mends, is left out.

        Raises:
            SelectionError: the budget fits no selection.
            ScoreError: scores rank nothing.
        """
        choose: Callable[..., Selection] = _found(self.selector)
        return choose(groups, scores_of, budget, compare=compare)

    @property
    def is_of_depth(self) -> bool:
        """Whether its units are whole parts of the depth, a group each."""
        return self.domain.name == "block"

    @property
    def several(self) -> str:
        """What several units are called."""
        return self.plural or f"{self.word}s"

    @property
    def edit(self) -> Edit:
        """How a selection is taken out of a model."""
        edit: Edit = _found(self.editor)
        return edit

    def axes_of(self, compare: str, pattern: str) -> tuple[str, ...]:
        """Axes of the domain along which the units lie that compete.

        Raises:
            RecipeError, SelectionError: such units know no such group, or no such pattern.
        """
        word = "N:M" if pattern != "free" else compare
        if pattern == "free" and "N columns" in self.compare and group_columns(compare):
            word = "N columns"
        if word not in self.compare:
            chosen = f"compare: {compare}" if pattern == "free" else f"pattern: {pattern}"
            raise RecipeError(
                f"{chosen} says nothing of unit: {self.word}; known: {', '.join(self.compare)}"
            )
        return self.compare[word]


def _in_units(group: Group) -> int:
    """Of which number of units its channels are the multiple that was asked for."""
    widths = [member.width for member in group.members if member.role == "consumer"]
    return group.multiple_of // math.gcd(group.multiple_of, *widths[:1])


def _found(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
