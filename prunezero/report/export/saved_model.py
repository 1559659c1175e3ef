"""A pruned model on disk: weights, card, recipe and report in one plain transformers folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from prunezero.errors import OutputError, reason
from prunezero.files.atomic import write_text
from prunezero.models.anatomy.block_probe import logits_of
from prunezero.models.anatomy.linears import Linear, block_prefix
from prunezero.models.editing.narrowing import is_of_stream
from prunezero.models.editing.rotating import is_rotated
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import refuse_other_logits, sliced
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.layouts import shapes_in_files
from prunezero.models.loading.shards import Shards
from prunezero.models.loading.source import Source
from prunezero.models.saving.companions import places_of_companions
from prunezero.models.saving.read_back import refuse_other_reading
from prunezero.models.saving.save import SavedSparsity, count_sparsity, save_model, stored_layers
from prunezero.models.unequal.families import MODEL_FILE
from prunezero.pruning.compare import finite_row
from prunezero.pruning.costs import Costs, model_costs
from prunezero.pruning.recipes.staged import AnyRecipe, recipes_of
from prunezero.pruning.streamed import FILES_BESIDE
from prunezero.pruning.testbed import Testbed
from prunezero.report.export.card import ZEROS_TAKE_ROOM, model_card
from prunezero.scoring.masking import count_zeros


@dataclass(frozen=True)
class Form:
    """What kind of folder a model without some units was saved as."""

    kind: str
    """plain, for classes of transformers; own_class, where layers differ in size; own_width, where
    all are of a size that the usual configuration refuses; own_bases, where attentions and MLPs
    read the residual stream in bases of their own; own_skipping, where tokens skip experts"""
    load: str
    """the line of Python that loads it"""
    checked: str
    """how it was read anew and compared"""
    largest_difference: float
    """of its logits, then, from those of the smaller model in memory"""

    @property
    def told(self) -> str:
        """What a card says of it."""
        how = {
            "plain": "Any version of transformers that loads the dense model loads it.",
            "own_class": "Its layers differ in size: `per_layer_config` in `config.json` says how, "
            "and the small Python files beside it are the classes that read that.",
            "own_width": "Its width is one that the usual configuration refuses; the two small "
            "Python files beside the weights are the classes that take it.",
            "own_skipping": "Tokens skip experts that weigh little beside their others: "
            "`per_layer_config` in `config.json` has the thresholds, and how many experts are left "
            "where layers differ in that; the small Python files beside it are the classes that "
            "read it.",
            "own_bases": "Its attentions and MLPs read the residual stream in bases of their own, "
            "and two matrices in each layer take it from one to the next; the three small Python "
            "files beside the weights are the classes that do so.",
        }
        return (
            f"{how[self.kind]} It is loaded by\n\n```python\n{self.load}\n```\n\n"
            f"{self.checked[0].upper()}{self.checked[1:]}: they differ by at most "
            f"{self.largest_difference:.2g}."
        )


_BY_OWN_FILES = (
    'AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)'
)
LOADING = {
    "plain": 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
    "own_class": _BY_OWN_FILES,
    "own_width": _BY_OWN_FILES,
    "own_bases": _BY_OWN_FILES,
    "own_skipping": _BY_OWN_FILES,
}


def files_beside(
    language_model: LanguageModel,
    recipe: AnyRecipe,
    rows: Sequence[Mapping[str, Any]],
    costs: Costs | None = None,
    *,
    dense_costs: Costs | None = None,
    form: Form | None = None,
) -> dict[str, str]:
    """What we put beside the weights of a pruned model, text by the names of `FILES_BESIDE`.

    Args:
        language_model: its name and source count; the card keeps the licence of that.
        rows: results of the dense and of the pruned model.
        costs: what the pruned model takes; None where it is not in memory as a whole.
        dense_costs: what the dense model takes, where the pruned one is really smaller.
        form: how that one was saved and checked.
    """
    first, *others = recipes_of(recipe)
    model = language_model.name
    plain = [finite_row(row) for row in rows]
    results = [{**row, "method": row["recipe"], "model": model} for row in plain]
    licence, note = _terms(language_model.source)
    told = {"costs": costs, "dense_costs": dense_costs, "saved": form}
    report = {"rows": plain} | {key: asdict(one) for key, one in told.items() if one is not None}
    return {
        "README.md": model_card(
            model,
            first.criterion,
            results,
            criteria=first.criteria,
            then=[(one.unit.several, one.criterion) for one in others],
            recipe=recipe.to_yaml(),
            license_id=licence,
            note=note,
            size=_size(costs, dense_costs, form),
            several=first.unit.several,
        ),
        "recipe.yaml": recipe.to_yaml(),
        "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
    }


def _size(costs: Costs | None, dense: Costs | None, form: Form | None) -> str:
    """What pruning made of the size of a model, and how such a model is loaded."""
    if costs is None or dense is None:
        return ZEROS_TAKE_ROOM
    less = 1 - costs.parameters / dense.parameters
    return (
        f"This model is smaller than the dense one: {costs.parameters:,} parameters of "
        f"{dense.parameters:,} ({less:.1%} fewer), {costs.flops / 1e6:,.1f} million floating-point "
        f"operations for each token of {dense.flops / 1e6:,.1f}. It holds no zeros in the place of "
        f"what went. {'' if form is None else form.told}"
    ).rstrip()


def _terms(source: Source | None) -> tuple[str, str]:
    """The licence that the source's card names, and a line on where that card is kept."""
    places = {} if source is None else places_of_companions(source.folder, ours=FILES_BESIDE)
    if source is None or "README.md" not in places:
        return "", ""
    note = f"The card of the dense model is kept as `{places['README.md']}`; its terms hold here."
    try:
        text = (source.folder / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        licence = front.get("license", "")
    # Whatever somebody's card holds.
    except (OSError, ValueError, LookupError, AttributeError, yaml.YAMLError, RecursionError):
        licence = ""
    return (licence if isinstance(licence, str) else ""), note


def save_pruned(
    testbed: Testbed,
    recipe: AnyRecipe,
    rows: Sequence[dict[str, Any]],
    layers: Sequence[Linear],
    folder: Path,
) -> SavedSparsity:
    """Save the model on the testbed, and count its zeros again from the files.

    Args:
        rows: results of the dense and of the pruned model.

    Raises:
        OutputError: the folder cannot be written, or the files do not hold what is in memory.
    """
    costs = model_costs(testbed.language_model, testbed.windows("validation")[:1])
    files = files_beside(testbed.language_model, recipe, rows, costs)
    save_model(testbed.language_model, folder, files=files)
    saved = count_sparsity(folder, stored_layers(testbed.language_model, layers, folder))
    in_memory = sum(count_zeros(layer.weight) for layer in layers)
    if saved.zeros != in_memory or saved.negative_zeros:
        raise OutputError(
            f"{folder} holds {saved.zeros} zeros ({saved.negative_zeros} of them negative) but the "
            f"model has {in_memory}; please report this"
        )
    return saved


@dataclass(frozen=True)
class SavedUnits:
    """What a folder holds of a model that is really smaller."""

    costs: Costs
    """of the saved model"""
    dense: Costs
    """of the model before"""
    stored: int
    """numbers in the files, counted there"""
    form: Form
    """how it was saved and checked"""


def save_smaller(
    testbed: Testbed,
    recipe: AnyRecipe,
    rows: Sequence[dict[str, Any]],
    smaller: Selection,
    folder: Path,
) -> SavedUnits:
    """Save the model on the testbed without the units that went, once it is sure to be the same.

    The folder is then read anew, and must compute what the smaller model does in memory.

    Args:
        rows: results of the dense and of the pruned model, whose units are zeros in memory.
        smaller: units that stay.

    Raises:
        ModelError: no configuration has such sizes, or the smaller model computes otherwise, in
            memory or as it was saved.
        OutputError: the folder cannot be written, or the files do not hold what they should.
    """
    model = testbed.language_model
    window = testbed.windows("validation")[:1]
    dense = model_costs(model, window)
    refuse_other_logits(model, smaller, window.to(model.device))
    with sliced(model, smaller):
        costs = model_costs(model, window)
        expected = logits_of(model, window.to(model.device))
    files = files_beside(model, recipe, rows, costs, dense_costs=dense)
    save_model(model, folder, files=files, smaller=smaller)
    stored = _stored(model, smaller, folder)
    own = "own_width" if is_of_stream(smaller) else "own_class"
    own = "own_bases" if is_rotated(smaller) else own
    skips = any(group.skip_below is not None for group in smaller.groups)
    own = "own_skipping" if skips else own
    kind = own if (folder / f"{MODEL_FILE}.py").is_file() else "plain"
    checked = f"its files were read anew and their logits for {window.shape[1]} tokens compared"
    difference = refuse_other_reading(folder, model, window, expected)
    form = Form(kind, LOADING[kind], f"{checked} with those in memory", difference)
    told = files_beside(model, recipe, rows, costs, dense_costs=dense, form=form)
    _write(folder, {name: text for name, text in told.items() if text != files[name]})
    return SavedUnits(costs, dense, stored, form)


def note_gguf(folder: Path, path: Path) -> None:
    """Say in the card and the report of a saved model that it was written for llama.cpp too.

    Args:
        path: of the .gguf file.

    Raises:
        OutputError: they cannot be written.
    """
    card = (folder / "README.md").read_text(encoding="utf-8")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    line = f"The same model for llama.cpp is `{path.name}`, a GGUF file of the architecture `deci`."
    told = json.dumps({**report, "gguf": path.name}, indent=2, allow_nan=False)
    _write(folder, {"README.md": f"{card}\n{line}\n", "report.json": f"{told}\n"})


def _write(folder: Path, files: Mapping[str, str]) -> None:
    try:
        for name, text in files.items():
            write_text(text, folder / name)
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be written ({reason(error, folder)})") from error


def _stored(model: LanguageModel, smaller: Selection, folder: Path) -> int:
    """Numbers in the files of a saved model, whose smaller tensors were looked at.

    Raises:
        OutputError: one is not of the size that it should be, or there although it went.
    """
    tensors = Shards(folder).tensors
    before = shapes_in_files(model.model, tensors)
    with sliced(model, smaller):
        now = {name: list(one.shape) for name, one in model.model.state_dict().items()}
        found = shapes_in_files(model.model, tensors)
    inside = f"{block_prefix(model.model)}."
    for name, wanted in now.items():
        have = found.get(name)
        if have != wanted and (have is not None or name.startswith(inside)):
            raise OutputError(
                f"{folder} holds '{name}' with shape {have}, not {wanted}; please report this"
            )
    left = sorted(before.keys() - now.keys())
    if left:
        raise OutputError(f"{folder} holds '{left[0]}', which went; please report this")
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
