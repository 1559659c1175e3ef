"""Options of `prunezero search`: None is what was not typed; `SearchConfig` has the usual values.

So a search that goes on knows what was typed this time; `show_default` tells the usual values.
"""

from __future__ import annotations

from copy import copy
from typing import Annotated, Any

import typer

from prunezero.cli import layer_options, options
from prunezero.cli.options import MOST_HANDS, MOST_ROWS


def _usually(option: Any, value: str) -> Any:
    """The option of another command, which shows this usual value."""
    ours = copy(option)
    ours.show_default = value
    return ours


Model = Annotated[str | None, _usually(options.MODEL, "demo")]
TextName = Annotated[str | None, _usually(options.TEXT, "demo")]
Pattern = Annotated[str | None, _usually(options.PATTERN, "free")]
Seed = Annotated[int | None, _usually(options.SEED, "0")]
SequenceLength = Annotated[int | None, _usually(options.SEQUENCE_LENGTH, "256, of keys 1024")]
CalibrationTokens = Annotated[
    int | None, _usually(options.CALIBRATION_TOKENS, "8192, of keys 8 windows")
]
EvaluationTokens = Annotated[
    int | None, _usually(options.EVALUATION_TOKENS, "4096, of keys 6 windows")
]
TestTokens = Annotated[int | None, _usually(options.TEST_TOKENS, "8192")]
Dtype = Annotated[str | None, _usually(options.DTYPE, "auto")]
Device = Annotated[str | None, _usually(options.DEVICE, "auto")]
Sparsity = options.Sparsity
Targets = Annotated[str | None, layer_options.TARGETS]
Ignore = Annotated[str | None, layer_options.IGNORE]
AlsoModel = Annotated[
    list[str] | None,
    typer.Option(
        help="Another model that the criterion has to be good on; may be given several times. "
        "Perplexities are then geometric means over all."
    ),
]
StartFrom = Annotated[
    list[str] | None,
    typer.Option(
        help="Name or folder of another search, or a recipe, whose rules to start from; may be "
        "given several times. What the space cannot write is left out."
    ),
]
Draws = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=99,
        help="Draws of calibration text that the criterion has to be good on, by seeds that count "
        "up from --seed. Perplexities are then geometric means over all.",
        show_default="1",
    ),
]
Also = Annotated[
    str | None,
    typer.Option(
        help="Other sparsities and patterns that the criterion has to serve, such as `0.7,2:4`; "
        "perplexities are then geometric means over all."
    ),
]
Signals = Annotated[
    str | None,
    typer.Option(
        help="The costliest that a rule may look at: `none` (weights alone), `activations`, "
        "`gradients` or `second order` (Gram matrices), in order of cost. Terminals and choices of "
        "the space that need more are left out: with `gradients` the features H, V and U, the "
        "updates obs, admm and swaps, and damping; with `activations` also G, G1, F, D and the "
        "gradient weights of the search's own layer error. Left out: as the space says."
    ),
]
Space = Annotated[
    str | None,
    typer.Option(help="Name or .yaml file; see `prunezero list spaces`.", show_default="formulas"),
]
Budget = Annotated[
    int | None, typer.Option(help="Candidates with a new mask to screen.", min=1, max=MOST_ROWS)
]
TimeLimit = Annotated[
    str | None, typer.Option("--time", help="Such as 90s, 10m or 2h, of the search alone.")
]
SearchName = Annotated[
    str | None, typer.Option("--name", help="Folder of this search inside the runs folder.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where --name stopped.")]
FromScratch = Annotated[
    bool | None, typer.Option("--from-scratch", help="Do not start from published formulas.")
]
StrategyWord = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        help="Who proposes; the others are controls to compare `evolution` with.",
        show_default="evolution",
    ),
]
ObjectiveWord = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help="What decides on search, validation and test text: `perplexity`, `kl` (nats per token "
        "to the dense model), `agreement` (share of tokens whose most likely follower is the dense "
        "model's) or `acceptance` (share of drafted tokens that speculative decoding with the "
        "dense model keeps).",
        show_default="perplexity",
    ),
]
StopEarly = Annotated[
    bool | None,
    typer.Option(
        "--stop-early",
        help="Measure a candidate no further once its first windows of text show that it cannot be "
        "among the best.",
    ),
]
Workers = Annotated[
    int, typer.Option(help="Processes or actors that evaluate candidates.", min=1, max=MOST_HANDS)
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Of each worker; the cores divided by --workers if left out.",
        min=1,
        max=MOST_HANDS,
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(help="Evaluate on Ray: address of a cluster, or `local`; see docs/scaling.md."),
]
