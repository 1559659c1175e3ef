"""Kinds of units: what may be removed from a model, one row for each word of a recipe's `unit`.

    formula -> scores -> selection -> edit -> measured model

Whatever goes, weights or whole parts of a network, goes this way; a row says what is particular to
one kind: the table that its formulas see, how its groups are found in a model, who competes with
whom, who scores and who chooses, and how the chosen are taken out (`unit_kind.py`).
"""

from __future__ import annotations

from prunezero.formula.domains import DOMAINS
from prunezero.pruning.recipes.attention_options import Columns, Links
from prunezero.pruning.recipes.unit_options import Channels, Depth, Directions, Experts, Units
from prunezero.pruning.recipes.word_options import Options
from prunezero.pruning.unit_kind import UnitKind


def _depth(
    word: str, meaning: str, finder: str, editor: str, baselines: tuple[str, ...]
) -> UnitKind:
    """A part of the depth of a model: all of the model compete, by what is seen of each whole."""
    return UnitKind(
        word=word,
        meaning=meaning,
        domain=DOMAINS["block"],
        compare={"model": ("part of the depth",)},
        baselines=baselines,
        reference="BI",
        finder=f"prunezero.models.anatomy.sub_blocks:{finder}",
        checker="prunezero.pruning.selecting:check_units",
        scorer="prunezero.pruning.unit_scores:depth_scores",
        selector="prunezero.pruning.depth:all_at_once",
        editor=f"prunezero.models.editing.{editor}",
        measure="parameters",
        options=Depth,
        whole_model="takes out whole parts of the depth, which are chosen together",
        observer="prunezero.models.observing.depth:depth_statistics",
    )


def _width(
    word: str,
    meaning: str,
    finder: str,
    reference: str,
    baselines: tuple[str, ...],
    plural: str = "",
) -> UnitKind:
    """Rows and columns of several matrices, which compete in one place or in the model."""
    return UnitKind(
        word=word,
        plural=plural,
        meaning=meaning,
        domain=DOMAINS["unit"],
        compare={"group": ("unit",), "model": ("unit",)},
        baselines=baselines,
        reference=reference,
        finder=f"prunezero.models.anatomy.{finder}",
        checker="prunezero.pruning.selecting:check_units",
        scorer="prunezero.pruning.unit_scores:row_scores",
        selector="prunezero.pruning.selecting:select_units",
        editor="prunezero.models.editing.slicing:SMALLER",
        measure="parameters",
        options=Units,
        whole_model="takes rows and columns out of several matrices together",
    )


def _run_time(
    word: str,
    meaning: str,
    options: type[Options],
    compare: tuple[str, ...],
    reference: str,
    baselines: tuple[str, ...],
    plural: str = "",
) -> UnitKind:
    """What attention works on: a policy leaves it out for a while, and no function edits weights.

    What installs it is `prunezero/pruning/attention.py`.
    """
    return UnitKind(
        word=word,
        meaning=meaning,
        domain=DOMAINS[word],
        compare={one: ("key",) for one in compare},
        baselines=baselines,
        reference=reference,
        finder="",
        checker="",
        scorer="",
        selector="",
        editor="",
        measure="units",
        options=options,
        plural=plural,
        whole_model="leaves out what attention works on while the whole model runs",
    )


_ROWS = (
    UnitKind(
        word="weight",
        meaning="a single weight of a linear map",
        domain=DOMAINS["matrix"],
        compare={
            "row": ("input",),
            "layer": ("output", "input"),
            "model": ("output", "input"),
            "N columns": ("output", "input"),
            "N:M": ("input",),
        },
        # Fisher is the strongest formula where all layers compete.
        baselines=(
            *("magnitude", "wanda", "ria", "gblm", "pruner_zero", "fisher"),
            *("sparsegpt", "admm"),
        ),
        reference="abs(W)*X",
        finder="prunezero.models.anatomy.groups:weight_groups",
        checker="prunezero.pruning.selecting:check_weights",
        scorer="prunezero.pruning.unit_scores:weight_scores",
        selector="prunezero.pruning.selecting:select_weights",
        editor="prunezero.models.editing.zeroing:ZEROS",
    ),
    _width(
        "neuron",
        "a channel inside an MLP: rows that make it, the column that reads it",
        "mlp:neuron_groups",
        "A*row_mean(abs(W))",
        ("neuron_magnitude", "wanda_sp", "flap", "minitron_neurons", "mask_fisher"),
    ),
    _width(
        "head",
        "a query head of attention, as many of each key-value head, which stays",
        "attention:query_heads",
        "M2",
        ("minitron_heads",),
    ),
    _width(
        "kv_group",
        "a key-value head of attention with all query heads that read it",
        "attention:kv_groups",
        "M2",
        ("random_units", "fasp", "flap", "minitron_heads", "mask_fisher"),
        plural="key-value groups",
    ),
    _width(
        "width",
        "a neuron or a key-value group: what makes a block narrower",
        "width:width_groups",
        "M2/PARAMS",
        ("random_units", "wanda_sp", "flap", "minitron_neurons", "mask_fisher", "obs_bias"),
        plural="neurons and key-value groups",
    ),
    UnitKind(
        word="channel",
        meaning="a channel of the residual stream, in all matrices, norms and embeddings on it",
        domain=DOMAINS["unit"],
        compare={"group": ("unit",)},
        baselines=("random_units", "minitron_channels"),
        reference="A2",
        finder="prunezero.models.anatomy.stream:channel_groups",
        checker="prunezero.pruning.selecting:check_units",
        scorer="prunezero.pruning.unit_scores:channel_scores",
        selector="prunezero.pruning.selecting:select_units",
        editor="prunezero.models.editing.slicing:NARROWER",
        measure="parameters",
        options=Channels,
        whole_model="takes a part of every block along",
    ),
    UnitKind(
        word="direction",
        meaning="a principal direction of the residual stream, in front of each attention and MLP",
        domain=DOMAINS["unit"],
        compare={"group": ("unit",)},
        baselines=("random_units", "slice_gpt"),
        reference="A",
        finder="prunezero.models.anatomy.directions:direction_groups",
        checker="prunezero.pruning.selecting:check_units",
        scorer="prunezero.pruning.unit_scores:direction_scores",
        selector="prunezero.pruning.selecting:select_units",
        editor="prunezero.models.editing.slicing:ROTATED",
        measure="units",
        options=Directions,
        whole_model="turns the residual stream of the whole model",
        walker="prunezero.models.observing.directions:chosen_directions",
    ),
    UnitKind(
        word="expert",
        meaning="an expert of a mixture: its matrices, and its row of the router",
        domain=DOMAINS["expert"],
        compare={"group": ("expert",), "model": ("expert",)},
        baselines=(
            *("expert_random", "expert_frequency", "ean", "reap", "man", "aimer"),
            "expert_sparsity",
        ),
        reference="GF/N",
        finder="prunezero.models.anatomy.expert_groups:expert_groups",
        checker="prunezero.pruning.selecting:check_units",
        scorer="prunezero.pruning.unit_scores:expert_scores",
        selector="prunezero.pruning.selecting:select_units",
        editor="prunezero.models.editing.slicing:ROUTED",
        measure="units",
        options=Experts,
        whole_model="sees which experts the router of each block chooses",
        observer="prunezero.models.observing.routing:routing_statistics",
    ),
    _depth(
        "attention",
        "the attention of a block",
        "attention_groups",
        "skipping:WITHOUT",
        ("attention_greedy",),
    ),
    _depth("mlp", "the MLP of a block", "mlp_groups", "skipping:WITHOUT", ()),
    _depth(
        "block",
        "the attention or the MLP of a block, which compete",
        "block_groups",
        "skipping:WITHOUT",
        ("block_pruner",),
    ),
    _depth(
        "layer",
        "a whole decoder block",
        "layer_groups",
        "shortening:SHORTER",
        ("random_layers", "shortgpt", "gromov", "shortened_llama", "sleb"),
    ),
    _run_time(
        "kv_column",
        "a key and value that a key-value head remembers, once the prompt was read",
        Columns,
        ("kv_head", "layer", "model"),
        "ATT_W",
        ("attention_random", "window_sink", "snapkv", "h2o", "keydiff"),
        "keys with their values",
    ),
    _run_time(
        "link",
        "what a query and a key before it have to do with each other in one head",
        Links,
        ("query",),
        "ATT",
        ("quest", "block_topk", "link_oracle"),
    ),
)

UNITS: dict[str, UnitKind] = {row.word: row for row in _ROWS}
