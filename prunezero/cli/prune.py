"""`prunezero prune`: one recipe, one model, one saved folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunezero.cli import options
from prunezero.cli.layer_options import Ignore, Targets
from prunezero.cli.options import (
    Allocate,
    CalibrationTokens,
    Device,
    Dtype,
    EvaluationTokens,
    JsonFile,
    Model,
    Pattern,
    Seed,
    SequenceLength,
    Sparsity,
    Statistics,
    TestTokens,
    TextName,
    Unit,
)
from prunezero.cli.quantities import bytes_of
from prunezero.errors import OutputError

if TYPE_CHECKING:
    from prunezero.models.anatomy.linears import Linear
    from prunezero.models.editing.selection import Selection
    from prunezero.models.loading.language_model import LanguageModel
    from prunezero.models.saving.save import SavedSparsity
    from prunezero.pruning.recipes.staged import AnyRecipe
    from prunezero.pruning.testbed import Testbed

PATTERN_LINE = "Zeros do not make a model smaller or faster unless its kernels use the pattern."
PADDED_LINE = "Zeros in the place of units take as much room and time as what stood there."
FIRST_LINE = "Free-form zeros do not make a model smaller or faster by themselves."


def prune(
    model: Model = "demo",
    text: TextName = "demo",
    recipe: Annotated[
        str, typer.Option(help="Name, .yaml file, or a Pruner-Zero tree in .json.")
    ] = "wanda",
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    allocate: Allocate = None,
    unit: Unit = None,
    output: Annotated[
        Path | None, typer.Option(help="New folder for the pruned model; without it, only report.")
    ] = None,
    targets: Targets = "",
    ignore: Ignore = "",
    statistics: Statistics = None,
    seed: Seed = 0,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            "--memory-limit",
            "--memory",
            help="Such as 900MiB: prune from files to files, one block in memory.",
        ),
    ] = None,
    padded: Annotated[
        bool,
        typer.Option(
            "--padded", help="Save units that go as zeros, tensors at the size of the dense model."
        ),
    ] = False,
    gguf: Annotated[
        Path | None,
        typer.Option(
            help="Write the --output folder as a .gguf file for llama.cpp too.",
            callback=options.expanded,
        ),
    ] = None,
    json_file: JsonFile = None,
    sequence_length: SequenceLength = 256,
    calibration_tokens: CalibrationTokens = 8192,
    evaluation_tokens: EvaluationTokens = 4096,
    test_tokens: TestTokens = 8192,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    r"""Prune a model by a recipe, measure it, and save it as a plain transformers folder.

    The folder holds dense safetensors with exact zeros, so every loader takes it, a model card,
    the recipe and a report. Its sparsity is counted again from the files. Recipes that remove
    neurons make tensors smaller instead; where layers differ in width, the folder has classes of
    its own, and `trust_remote_code=True` loads it. `--padded` saves zeros at full size; `--gguf`
    writes the same model as one file that llama.cpp runs.

    With a memory limit, weights are read and written block by block; what a stopped run has done
    waits beside the output, and the same command goes on there. So it is with recipes of several
    steps, without a limit too. The files are then read once more for each text that the dense and
    the pruned model are measured on; fewer `--evaluation-tokens` and `--test-tokens` shorten that.

    Examples:

        prunezero prune --model demo --recipe wanda --sparsity 0.5 --output pruned

        prunezero prune --model demo --recipe runs/first/recipe.yaml --pattern 2:4 --output pruned

        prunezero prune --model demo --recipe ria --sparsity 0.5 --ignore "re:layers\.0\."

        prunezero prune --model demo --recipe wanda_sp --sparsity 0.2 --output smaller

        prunezero prune --model demo --recipe flap --sparsity 0.2 --output smaller --gguf it.gguf

        prunezero prune --model ./7b --recipe wanda --sparsity 0.5 --memory-limit 6GiB --output out
    """
    from prunezero.cli.tables import say, waiting
    from prunezero.files.places import check_apart, try_folder
    from prunezero.models.anatomy.patterns import patterns_of
    from prunezero.pruning.recipes.staged import load_recipe, refuse_stages
    from prunezero.pruning.requirements import settled_sparsity
    from prunezero.pruning.testbed import set_up, with_choices

    options.check_statistics(statistics)
    options.check_json(json_file)
    check_apart({"--json": json_file, "--output": output, "--gguf": gguf})
    limit = bytes_of(memory_limit)
    _check_gguf(gguf, output, memory_limit)
    (found,) = options.on_unit([load_recipe(recipe)], unit)
    chosen = with_choices(
        found,
        pattern=pattern,
        allocate=allocate,
        statistics=statistics,
        targets=patterns_of(targets) or None,
        ignore=patterns_of(ignore) or None,
    )
    fraction = settled_sparsity(chosen.pattern, sparsity)
    settings = options.make_settings(
        sequence_length, calibration_tokens, evaluation_tokens, test_tokens, seed
    )
    if output is not None:
        output = try_folder(output)
    faults: list[OutputError] = []
    if limit is None:
        with waiting(f"loading {model}"):
            testbed = set_up(model, text, settings, dtype=dtype, device=device)
        places = Places(output, gguf)
        row = _prune_in_memory(testbed, chosen, fraction, places, faults, padded=padded)
    else:
        from prunezero.cli.streamed import open_files, prune_files

        if output is None:
            raise OutputError("--memory-limit prunes into files, so it needs an --output folder")
        why = "which look at the whole model as pruned so far; leave --memory-limit out"
        one = refuse_stages(chosen, why)
        with waiting(f"opening {model}"):
            streamed, testbed = open_files(model, text, settings, dtype=dtype, device=device)
        row = prune_files(streamed, testbed, one, fraction, output, limit)
    if chosen.unit.is_usual:
        say(FIRST_LINE if chosen.pattern == "free" else PATTERN_LINE)
    elif padded:
        say(PADDED_LINE)
    with _noted(faults):
        options.write_json({"model": model, "text": text, **row}, json_file)
    if faults:
        raise OutputError("; ".join(map(str, faults)))


@dataclass(frozen=True)
class Places:
    """Where a pruned model goes."""

    output: Path | None
    """new folder"""
    gguf: Path | None
    """file for llama.cpp"""


def _check_gguf(gguf: Path | None, output: Path | None, memory_limit: str | None) -> None:
    """Refuse a .gguf file that could not be written in the end.

    Raises:
        OutputError: it is not named so, cannot be written, or nothing is there to write it from.
    """
    from prunezero.files.places import try_file

    if gguf is None:
        return
    if output is None or memory_limit is not None:
        raise OutputError(
            "--gguf writes what the --output folder holds, of a model in memory; name an --output, "
            "and leave --memory-limit out"
        )
    if gguf.suffix != ".gguf":
        raise OutputError(f"--gguf {gguf} is no name of a GGUF file; let it end in .gguf")
    try_file(gguf, "--gguf", example="model.gguf")


def _prune_in_memory(
    testbed: Testbed,
    recipe: AnyRecipe,
    sparsity: float,
    places: Places,
    faults: list[OutputError],
    *,
    padded: bool,
) -> dict[str, Any]:
    """Prune, measure, print, and save where an output is named; returns the pruned row.

    What the disk does not take is added to the faults, once all else is done.
    """
    from prunezero.cli.tables import (
        Bars,
        console,
        results_table,
        say,
        say_about,
        say_conditions,
        waiting,
    )
    from prunezero.pruning.compare import SPLITS, RecipeRunner
    from prunezero.pruning.recipes.staged import recipes_of
    from prunezero.pruning.requirements import dense_sums
    from prunezero.pruning.staging import edit_of

    name, output = testbed.language_model.name, places.output
    say_about([testbed], [recipe])
    is_smaller = output is not None and edit_of(recipe).makes_smaller and not padded
    layers = _layers_once_checked(
        testbed.language_model, recipe, sparsity, places, padded=padded, is_smaller=is_smaller
    )
    steps = _folder_of_steps(recipe, output)
    with Bars() as bars:
        sums = testbed.statistics(layers, dense_sums(recipes_of(recipe)[:1]), bars)
        with waiting("measuring the dense model"):
            runner = RecipeRunner(testbed, sums)
            rows = [runner.dense_row(SPLITS)]
        with waiting(f"pruning by {recipe.name}, then measuring"):
            rows.append(
                runner.row(recipe, sparsity, SPLITS, keep=True, folder=steps, progress=bars)
            )
    console.print(results_table(rows, f"{recipe.name} on {name}"))
    say_conditions(rows, name, [testbed])
    if "expert_calls_skipped" in rows[-1]:
        share = rows[-1]["expert_calls_skipped"]
        say(f"tokens of validation text skip {share:.1%} of the calls of experts")
    if output is not None:
        selection = runner.outcome.selection if is_smaller and runner.outcome else None
        with _noted(faults):
            if selection is None:
                reached = _save(testbed, recipe, rows, layers, output)
                rows[-1] |= {"sparsity_reached": reached} if recipe.unit.is_usual else {}
            else:
                _save_smaller(testbed, recipe, rows, selection, output)
            if places.gguf is not None:
                _write_gguf(testbed.language_model, output, places.gguf)
            if steps is not None:
                shutil.rmtree(steps, ignore_errors=True)
    return rows[-1]


def _layers_once_checked(
    language_model: LanguageModel,
    recipe: AnyRecipe,
    sparsity: float,
    places: Places,
    *,
    padded: bool,
    is_smaller: bool,
) -> list[Linear]:
    """The layers that are pruned, once it is sure that what comes of it can be saved.

    Raises:
        PruneZeroError: it cannot, or the recipe does not fit the model.
    """
    from prunezero.files.places import check_room
    from prunezero.models.editing.slicing import ROTATED
    from prunezero.models.saving.save import check_names, saved_bytes
    from prunezero.pruning.recipes.recipe import Recipe
    from prunezero.pruning.reordering import Reordering
    from prunezero.pruning.staging import check_recipe, edit_of, refuse_unequal_widths

    if places.gguf is not None:
        if edit_of(recipe) is ROTATED:
            raise OutputError(
                "no architecture of llama.cpp reads the residual stream in several bases, so a "
                f"model without some {recipe.unit.several} is no GGUF file; leave --gguf out"
            )
        _refuse_without_gguf(language_model)
    if padded and not edit_of(recipe).zeros_suffice:
        raise OutputError(
            f"--padded saves zeros at full size, but no zeros stand for {recipe.unit.several} that "
            "are gone; leave --padded out"
        )
    layers = check_recipe(language_model, recipe, sparsity)
    # Refuses a permutation that cannot be had.
    moves = isinstance(recipe, Recipe) and Reordering(language_model, recipe, layers).moves
    if is_smaller:
        refuse_unequal_widths(language_model, recipe, sparsity)
    if places.output is not None:
        check_names(language_model, moves=moves)
        check_room(places.output, saved_bytes(language_model), "the pruned model")
    if places.gguf is not None:
        check_room(places.gguf, saved_bytes(language_model), "the GGUF file")
    return layers


def _save(
    testbed: Testbed,
    recipe: AnyRecipe,
    rows: Sequence[dict[str, Any]],
    layers: Sequence[Linear],
    output: Path,
) -> float:
    """Save what is on the testbed, and print what was saved; the sparsity counted in the files.

    Raises:
        OutputError: it is not in the output; the message says where it is.
    """
    from prunezero.cli.rescue import saved_or_kept
    from prunezero.cli.tables import say
    from prunezero.models.saving.save import saved_bytes
    from prunezero.report.export.saved_model import save_pruned

    def save(folder: Path) -> SavedSparsity:
        return save_pruned(testbed, recipe, rows, layers, folder)

    saved = saved_or_kept(save, output, saved_bytes(testbed.language_model))
    say(
        f"saved to {output}: {saved.zeros} of {saved.total} weights of {len(layers)} layers "
        "are zero, counted from the files"
    )
    return saved.sparsity


def _save_smaller(
    testbed: Testbed,
    recipe: AnyRecipe,
    rows: Sequence[dict[str, Any]],
    selection: Selection,
    output: Path,
) -> None:
    """Save what is on the testbed without the units that went, and print what became smaller.

    Raises:
        OutputError: it is not in the output; the message says where it is.
    """
    from prunezero.cli.rescue import saved_or_kept
    from prunezero.cli.tables import say
    from prunezero.models.saving.save import saved_bytes
    from prunezero.report.export.saved_model import SavedUnits, save_smaller

    def save(folder: Path) -> SavedUnits:
        return save_smaller(testbed, recipe, rows, selection, folder)

    saved = saved_or_kept(save, output, saved_bytes(testbed.language_model))
    row = rows[-1]
    say(
        f"saved to {output}: {row['units_removed']:,} of {row['units']:,} "
        f"{recipe.unit.several} are gone; "
        f"{saved.stored:,} numbers in the files, {saved.costs.parameters:,} of "
        f"{saved.dense.parameters:,} parameters and {saved.costs.flops / saved.dense.flops:.1%} of "
        "the FLOPs are left"
    )
    reasons = {
        "own_class": "layers differ in size, so ",
        "own_width": "its width is unusual, so ",
        "own_bases": "its residual stream has several bases, so ",
        "own_skipping": "its tokens skip experts, so ",
    }
    differ = reasons.get(saved.form.kind, "")
    say(
        f"{differ}load it by {saved.form.load.replace('path/to/this/folder', str(output))}; read "
        f"anew, its logits differ by at most {saved.form.largest_difference:.2g} from those in "
        "memory"
    )


def _refuse_without_gguf(language_model: LanguageModel) -> None:
    """Refuse a model or tokenizer that cannot be written for llama.cpp, before the work.

    Raises:
        ModelError: it cannot; the message says why.
    """
    from prunezero.models.loading.gguf import gguf_file_of
    from prunezero.models.saving.gguf_deci import refuse_without_deci
    from prunezero.models.saving.gguf_tokenizer import refuse_without_fields

    refuse_without_deci(language_model.model.config, language_model.name)
    if language_model.source is not None:
        folder, file = language_model.source.folder, gguf_file_of(language_model.name)
        refuse_without_fields(folder, file)


def _write_gguf(language_model: LanguageModel, output: Path, gguf: Path) -> None:
    """Write a saved model for llama.cpp, and say so there and here.

    Raises:
        ModelError, OutputError: as `write_deci`.
    """
    from prunezero.cli.tables import say
    from prunezero.files.places import mebibytes
    from prunezero.models.loading.gguf import gguf_file_of
    from prunezero.models.saving.gguf_deci import write_deci
    from prunezero.report.export.saved_model import note_gguf

    write_deci(output, gguf, language_model.tokenizer, gguf_file_of(language_model.name))
    note_gguf(output, gguf)
    say(
        f"written for llama.cpp: {gguf}, {mebibytes(gguf.stat().st_size)}, architecture deci, "
        "which has a size for each layer"
    )


@contextmanager
def _noted(faults: list[OutputError]) -> Iterator[None]:
    """Within it, what cannot be written is noted and stops nothing."""
    try:
        yield
    except OutputError as error:
        faults.append(error)


def _folder_of_steps(recipe: AnyRecipe, output: Path | None) -> Path | None:
    """Where the finished steps of a pruning of several wait, in case it is stopped.

    Raises:
        OutputError: something else is there.
    """
    from prunezero.cli.tables import say
    from prunezero.pruning.recipes.staged import recipes_of

    stages = recipes_of(recipe)
    is_quick = all(one.schedule.is_usual and one.recover.is_usual for one in stages)
    # Of several stages none is kept: weights alone do not say which units went.
    if output is None or is_quick or len(stages) > 1:
        return None
    folder = output.absolute().with_name(f"{output.absolute().name}.partial")
    if (folder / "request.json").is_file():
        say(f"going on with what an earlier run left in {folder}")
    # A crash may have come before the request was in its place; its beginning has a dot.
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise OutputError(
            f"'{folder}' holds no steps of this command; move it away, or choose another output"
        )
    return folder
