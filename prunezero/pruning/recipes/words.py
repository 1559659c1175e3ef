"""What may a recipe choose at each arrow, and which numbers go with a word?

A choice is a word, or a word with its numbers: `update: obs`, `allocate: {owl: {spread: 0.1}}`.
A row of `WORDS` is all that is known of a word but its arithmetic, which is one function elsewhere
on this floor; whoever applies a recipe asks the row. No torch here, so that recipes can be read and
listed without it: a row names its function, and a test holds the two together.
"""

from __future__ import annotations

from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.training_options import Distil, Lora, Tune
from prunezero.pruning.recipes.word_options import (
    Admm,
    Dsnot,
    Evolve,
    HeavyTail,
    Iterative,
    Options,
    Owl,
    Periods,
    Permutation,
    Refit,
    Sensitivity,
    Slopes,
    Subsets,
    Swaps,
    Table,
    WhileTraining,
)
from prunezero.pruning.recipes.word_row import Word
from prunezero.scoring.request import GROUPS

# Words that mean the same whatever is removed.
_EVERY = frozenset(UNITS)
# What is a part of the weights.
_STORED = frozenset(word for word, kind in UNITS.items() if not kind.domain.is_run_time)
# Words that take columns out of matrices.
_WIDTH = frozenset({"neuron", "head", "kv_group", "width"})
_OF_DEPTH = frozenset(word for word, kind in UNITS.items() if kind.is_of_depth)
# Those that no weights of linear maps stand for.
_APART = frozenset({"channel", "direction", "expert"})
_GRAM = frozenset({"gram"})
_SEEN_BY_READERS = frozenset({"gram", "input_sum"})
_INPUTS = frozenset({"input_sum", "input_square_sum"})
_ALL_BLOCKS = "looks at all blocks before the first is pruned"
_TRAINS = "trains all blocks together"
_REORDERS = "reorders the model as a whole"

WORDS: dict[str, dict[str, Word]] = {
    "allocate": {
        "uniform": Word(
            Options,
            "every layer loses the same fraction",
            "allocation:uniform",
            is_usual=True,
            units=_EVERY,
        ),
        "owl": Word(
            Owl,
            "blocks with more outliers lose less",
            "allocation:owl",
            "activations",
            frozenset({"input_square_sum"}),
            whole_model=_ALL_BLOCKS,
        ),
        "sensitivity": Word(
            Sensitivity,
            "matrices with a larger trace of the Hessian lose less",
            "allocation:sensitivity",
            "gradients",
            needs_text=True,
            whole_model=_ALL_BLOCKS,
        ),
        "heavy_tail": Word(
            HeavyTail,
            "blocks with heavier-tailed spectra lose less",
            "allocation:heavy_tail",
            whole_model=_ALL_BLOCKS,
        ),
        "table": Word(Table, "ratios by layer pattern", "allocation:table"),
        "slopes": Word(
            Slopes,
            "groups that move the model less by themselves lose more",
            "unit_allocation:slopes",
            sums=_SEEN_BY_READERS,
            needs_text=True,
            whole_model=_ALL_BLOCKS,
            units=_WIDTH | {"expert"},
            tries=True,
        ),
        "evolve": Word(
            Evolve,
            "the best of many allocations by KL to the dense model",
            "unit_allocation:evolve",
            sums=_SEEN_BY_READERS,
            needs_text=True,
            whole_model=_ALL_BLOCKS,
            units=_WIDTH | {"expert"},
            tries=True,
        ),
    },
    "update": {
        "none": Word(
            Options,
            "weights that stay are not changed",
            "updates.mend:keep",
            is_usual=True,
            units=_EVERY,
        ),
        "obs": Word(
            Options,
            "optimal brain surgeon, column by column",
            "updates.mend:obs",
            "second order",
            _GRAM,
            order=1,
            mends=True,
        ),
        "admm": Word(
            Admm,
            "kept weights are fitted again to the outputs before",
            "updates.mend:admm",
            "second order",
            _GRAM,
            order=2,
            mends=True,
            sees_dense=True,
        ),
        "refit": Word(
            Refit,
            "least squares on the columns that stay",
            "updates.mend:refit_columns",
            "second order",
            _SEEN_BY_READERS,
            order=2,
            mends=True,
            sees_dense=True,
            units=_WIDTH,
        ),
        "bias": Word(
            Options,
            "biases take over the mean of what was removed",
            "updates.mend:take_over_mean",
            "activations",
            frozenset({"input_sum"}),
            order=3,
            sees_dense=True,
            needs_biases=True,
            units=_STORED - _OF_DEPTH - _APART,
        ),
        "swaps": Word(
            Swaps,
            "the mask is improved by a row's best exchanges",
            "updates.mend:swaps",
            "second order",
            _GRAM,
            changes_mask=True,
        ),
        "dsnot": Word(
            Dsnot,
            "the mask is improved by DSnoT's exchanges",
            "updates.mend:refine_by_dsnot",
            "activations",
            _INPUTS,
            changes_mask=True,
        ),
    },
    "permute": {
        "none": Word(
            Options,
            "channels stay in their order",
            "permutation:stay",
            is_usual=True,
            units=_EVERY,
        ),
        "heuristic": Word(
            Permutation,
            "channels are dealt out to groups by importance",
            "permutation:deal_out",
            whole_model=_REORDERS,
        ),
        "assignment": Word(
            Permutation,
            "dealt out, then improved by linear sum assignment",
            "permutation:assign",
            whole_model=_REORDERS,
        ),
    },
    "schedule": {
        "one-shot": Word(
            Options, "one pruning step", "schedule:one_shot", is_usual=True, units=_EVERY
        ),
        "iterative": Word(
            Iterative,
            "several pruning steps of growing sparsity",
            "schedule:iterative",
            units=_STORED - _OF_DEPTH - _APART,
            whole_model="prunes the model several times",
        ),
        "greedy": Word(
            Options,
            "one unit goes, and all others are scored anew, until enough are gone",
            "schedule:greedy",
            units=_OF_DEPTH,
            chooser="depth:one_by_one",
        ),
        "span": Word(
            Options,
            "neighbouring layers go, those that score lowest as a whole",
            "schedule:span",
            units=frozenset({"layer"}),
            chooser="depth:best_span",
        ),
        "subsets": Word(
            Subsets,
            "of each mixture those experts go without which its output changes least, as a whole",
            "schedule:subsets",
            "oracle",
            needs_text=True,
            units=frozenset({"expert"}),
            whole_model="carries text from block to block",
            chooser="expert_subsets:best_subsets",
        ),
        "while_training": Word(
            WhileTraining,
            "units go step by step while the recovery trains low-rank factors",
            "schedule:while_training",
            "gradients",
            units=_WIDTH,
            whole_model=_TRAINS,
            in_training=True,
        ),
        "periods": Word(
            Periods,
            "units shrink to nothing in periods of the recovery, in each the lowest that stay",
            "schedule:periods",
            "gradients",
            units=_WIDTH,
            whole_model=_TRAINS,
            in_training=True,
        ),
    },
    "recover": {
        "none": Word(
            Options, "no training", "recovery.words:no_training", is_usual=True, units=_EVERY
        ),
        "tune": Word(
            Tune,
            "short fine-tuning with the mask held",
            "recovery.words:tune",
            "gradients",
            needs_text=True,
            whole_model=_TRAINS,
            units=_STORED - _APART,
        ),
        "lora": Word(
            Lora,
            "low-rank factors under the mask, merged into the weights",
            "recovery.words:lora",
            "gradients",
            needs_text=True,
            whole_model=_TRAINS,
            units=_STORED - _APART,
        ),
        "distil": Word(
            Distil,
            "towards the dense model's next-token distribution, with the mask held",
            "recovery.words:distil",
            "gradients",
            needs_text=True,
            whole_model=_TRAINS,
            units=_STORED - _APART,
        ),
    },
}


# Choices that are a word or a number alone, for those who ask what there is.
PLAIN_WORDS = {
    "compare": {**GROUPS, "group": "units of one place, such as the neurons of one MLP"},
    "pattern": {
        "free": "zeros may stand anywhere",
        "N:M": "N of every M neighbouring weights are kept, such as 2:4",
    },
    "statistics": {
        "dense": "layers see the dense model",
        "sequential": "layers see the model as pruned so far, block by block",
    },
    "damping": {
        "0.01": "share of the mean Gram diagonal added before an inversion; above 0, at most 1"
    },
}
