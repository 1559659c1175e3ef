"""SearchConfig: one search experiment, everything that its results depend on, by name.

The command line builds it, `search.json` holds it, a worker gets it, it heads the journal beside
the fingerprints of what its names lead to, and recipes and MLflow show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from prunezero.errors import RecipeError, did_you_mean
from prunezero.formula.criterion import Criterion
from prunezero.formula.feature_row import WEIGHT_SIGNALS
from prunezero.models.anatomy.patterns import patterns_of
from prunezero.pruning.budget import Budget
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.prompts import WINDOW, window_tokens
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.requirements import settled_sparsity
from prunezero.pruning.testbed import Settings, Testbed
from prunezero.searching.experiment.budgets import read_budgets
from prunezero.searching.experiment.objectives import USUAL
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.spaces.space import SearchSpace

# A value that leaves the choice to the machine.
OPEN = "auto"
# Fields that only a search for what leaves the weights has.
_OF_WEIGHTS = tuple(
    "also_model pattern also draws targets ignore strategy objective stop_early".split()
)


def _words(value: object) -> object:
    """A text with commas, as the command line and older files have it, or a list, as a tuple."""
    if isinstance(value, str):
        return patterns_of(value)
    return () if value is None else tuple(value) if isinstance(value, list) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]


class StartingRule(BaseModel):
    """A rule to start from, as it was when the search was asked for."""

    model_config = ConfigDict(frozen=True)

    formula: str
    """its criterion"""
    choices: dict[str, Any] = {}
    """values of recipe keys, as their YAML spells them"""


class SearchConfig(BaseModel):
    """One search experiment. Fields are called as the options of `prunezero search`.

    Fields that only say where something is (models, text, device, names of the space and of what it
    starts from) may change when a search goes on elsewhere; fingerprints tell whether it is the
    same.
    """

    # What an older or a later version kept beside is left out.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    model: str = "demo"
    """as `load_model` takes it"""
    also_model: Words = ()
    """further models that rules have to be good on"""
    text: str = "demo"
    """as `load_text` takes it"""
    sparsity: float | None = None
    """fraction of the weights to remove; None where the pattern says it"""
    pattern: str = "free"
    """free or N:M"""
    also: Words = ()
    """other budgets that rules have to serve, such as 0.7 and 2:4"""
    draws: int = 1
    """of calibration text that rules have to be good on"""
    targets: Words = ()
    """layers to prune, by pattern; all where there is none"""
    ignore: Words = ()
    """layers to leave alone, by pattern"""
    space: str = "formulas"
    """name or path of the search space"""
    signals: str = WEIGHT_SIGNALS[-1]
    """the costliest that a rule may look at, as `space_content` has it"""
    seed: int = 0
    """of every draw"""
    calibration_seed: int | None = None
    """of the calibration text; None: the same"""
    from_scratch: bool = False
    """whether it starts without published formulas"""
    start_from: Words = ()
    """searches and recipes whose rules it starts from"""
    strategy: str = "evolution"
    """who proposes rules, see `strategies/catalogue.py`"""
    objective: str = USUAL
    """what rules are measured by, see `objectives.py`"""
    stop_early: bool = False
    """whether a candidate is left alone once its first windows show that it cannot be among the
    best, see `evaluation/early_stop.py`"""
    sequence_length: int = 256
    """tokens in a window"""
    calibration_tokens: int = 8192
    """tokens that statistics are made from"""
    evaluation_tokens: int = 4096
    """tokens of search and of validation text"""
    test_tokens: int = 8192
    """tokens of test text"""
    dtype: str = OPEN
    """of the weights"""
    device: str = OPEN
    """where the model is"""
    space_content: SearchSpace
    """the search space itself"""
    start: tuple[StartingRule, ...] = ()
    """the rules that `start_from` leads to"""

    @classmethod
    def of(cls, **named: Any) -> SearchConfig:
        """The experiment of these fields; the space is read by its name where it is not given.

        Where units are of run time, windows are longer, and there are as many as are read then.

        Raises:
            RecipeError: there is no such field, or it holds what it may not; or there is no such
                search space, nothing is left of it under these signals, or a field says nothing of
                its units, which are of run time.
        """
        for name in named.keys() - cls.model_fields.keys():
            near = did_you_mean(name, cls.model_fields) or "."
            raise RecipeError(
                f"'{name}' is no option of a search{near} Known: {', '.join(cls.model_fields)}"
            )
        space, signals = named.get("space_content"), named.get("signals")
        if space is None:
            space = SearchSpace.load(named.get("space", "formulas"), signals=signals)
        elif not isinstance(space, SearchSpace):
            raise RecipeError(f"space_content must be a SearchSpace but is {space!r:.60}")
        elif signals is not None:
            limited = {**space.model_dump(mode="json"), "signals": signals}
            space = validated(SearchSpace, limited, f"search space {space.name}")
        usual = _of_run_time(space, named) if UNITS[space.unit].domain.is_run_time else {}
        told = {"space": space.name, **usual, **named}
        found = {**told, "space_content": space, "signals": space.signals}
        return validated(cls, found, "search")

    @property
    def is_run_time(self) -> bool:
        """Whether it looks for recipes of what is left out while a model runs."""
        return UNITS[self.space_content.unit].domain.is_run_time

    @property
    def settings(self) -> Settings:
        """How much of the text is used."""
        seed = self.seed if self.calibration_seed is None else self.calibration_seed
        return Settings(
            self.sequence_length,
            self.calibration_tokens,
            self.evaluation_tokens,
            self.test_tokens,
            seed,
        )

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """All that a rule has to serve; that of `sparsity` and `pattern` first.

        Raises:
            PruneZeroError: sparsity and pattern do not go together, or a word is no budget.
        """
        own = Budget(settled_sparsity(self.pattern, self.sparsity), pattern=self.pattern)
        return own, *read_budgets(",".join(self.also))

    @property
    def rules(self) -> list[Rule]:
        """The rules of `start`."""
        return [Rule.read(one.formula, one.choices) for one in self.start]

    @classmethod
    def on(
        cls, testbed: Testbed, also_testbeds: Sequence[Testbed] = (), **named: Any
    ) -> SearchConfig:
        """The experiment on models that are loaded already; `named` are other fields.

        Raises:
            RecipeError: as `of`, or a field is what the testbed says.
        """
        settings, model = testbed.settings, testbed.language_model
        seed = named.get("seed", 0)
        fixed: dict[str, Any] = {
            "model": model.name,
            "also_model": tuple(one.language_model.name for one in also_testbeds),
            "text": testbed.text.name,
            "calibration_seed": None if settings.seed == seed else settings.seed,
            "sequence_length": settings.sequence_length,
            "calibration_tokens": settings.calibration_tokens,
            "evaluation_tokens": settings.evaluation_tokens,
            "test_tokens": settings.test_tokens,
            "dtype": model.dtype_word,
            "device": model.device.type,
        }
        for name in named.keys() & fixed.keys():
            raise RecipeError(f"'{name}' is what the testbed says; set it up with another one")
        return cls.of(**named, **fixed)

    def settled(self, testbed: Testbed) -> SearchConfig:
        """The same without what was left to the machine and to the pattern."""
        model = testbed.language_model
        found = {
            "dtype": model.dtype_word,
            "device": model.device.type if self.device == OPEN else self.device,
            "sparsity": self.budgets[0].amount,
            "also": tuple(budget.word for budget in self.budgets[1:]),
        }
        return self.model_copy(update=found)

    def answered_under(self) -> dict[str, Any]:
        """What the answer to any request depends on, beside models and text, as JSON."""
        further = {
            "also": [budget.word for budget in self.budgets[1:]],
            "draws": self.draws if self.draws > 1 else None,
            "targets": list(self.targets),
            "ignore": list(self.ignore),
            **self._other_objective(),
        }
        return {
            "settings": vars(self.settings).copy(),
            "sparsity": self.budgets[0].amount,
            **{key: value for key, value in further.items() if value},
        }

    def _other_objective(self) -> dict[str, str]:
        """The objective where it is another than that of searches before there were several."""
        return {} if self.objective == USUAL else {"objective": self.objective}

    def decided_by(self) -> dict[str, Any]:
        """What decides how the search goes, beside its answers, as JSON."""
        return {
            "space": self.space_content.decides(),
            "pattern": self.pattern,
            "seed": self.seed,
            "strategy": self.strategy,
            **self._other_ending(),
        }

    def _other_ending(self) -> dict[str, bool]:
        """Whether candidates are stopped early, where they are."""
        return {"stop_early": True} if self.stop_early else {}

    def shown(self) -> dict[str, Any]:
        """What a person is told of it: in the recipe that it found, and in MLflow."""
        further = {
            **{"also_models": list(self.also_model), "also": list(self.also)},
            **{"draws": self.draws if self.draws > 1 else None},
            **{"targets": list(self.targets), "ignore": list(self.ignore)},
            **self._other_objective(),
            **self._other_ending(),
        }
        return {
            "model": self.model,
            "text": self.text,
            "space": self.space_content.name,
            "signals": self.space_content.costliest_signal,
            "strategy": self.strategy,
            "sparsity": self.budgets[0].amount,
            "pattern": self.pattern,
            **{key: value for key, value in further.items() if value},
            "seed": self.seed,
            "calibration_tokens": self.calibration_tokens,
            "sequence_length": self.sequence_length,
            "dtype": self.dtype,
        }


def _of_run_time(space: SearchSpace, named: Mapping[str, Any]) -> dict[str, int]:
    """The usual sizes of a search for recipes of run time, by field.

    Raises:
        RecipeError: a field asks for what such a search does not have.
    """
    for key in [key for key in _OF_WEIGHTS if key in named]:
        field = SearchConfig.model_fields[key]
        if named[key] != field.get_default():
            raise RecipeError(
                f"search space {space.name} is of unit: {space.unit}, which is left out while a "
                f"model runs, and --{key.replace('_', '-')} says nothing of that; leave it out"
            )
    length = named.get("sequence_length", WINDOW)
    usual = window_tokens(length) if isinstance(length, int) else {}
    return {"sequence_length": length, **usual}


def starting_rules(rules: Sequence[Rule | Criterion | str]) -> tuple[StartingRule, ...]:
    """Rules, or formulas alone, as an experiment keeps them.

    Raises:
        CriterionError: a formula cannot be read.
    """
    formulas = [Criterion.parse(one) if isinstance(one, str) else one for one in rules]
    found = [Rule(one) if isinstance(one, Criterion) else one for one in formulas]
    return tuple(
        StartingRule(formula=one.criterion.text, choices=dict(one.choices)) for one in found
    )
