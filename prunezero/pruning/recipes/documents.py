"""YAML that people write by hand: read as data only, typed the way it looks.

Plain YAML 1.1 reads `2:4` as 124, `no` as false and `1e-3` as text. Ours knows only true, false,
null, decimal numbers and text; it has no tags, anchors or aliases, and files are small.
"""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationError

from prunezero.errors import PruneZeroError, RecipeError, did_you_mean, reason
from prunezero.files.atomic import write_text
from prunezero.models.anatomy.patterns import check_pattern

MAX_BYTES = 64 * 1024
MAX_NODES = 4096
MAX_DEPTH = 16
# Of one document, more are not told at once.
_MOST_FAULTS = 50
# Keys that people expect in a document, and where they belong.
ELSEWHERE = {"sparsity": "how much goes is no part of a recipe; say it with --sparsity"}

Model = TypeVar("Model", bound=BaseModel)


def checked(check: Callable[[str], object], value: str) -> str:
    """The value, if a check of ours lets it pass; pydantic gathers the faults of all keys."""
    try:
        check(value)
    except PruneZeroError as error:
        raise ValueError(str(error)) from error
    return value


def _not_too_many(value: object) -> object:
    if isinstance(value, Sized) and not isinstance(value, str) and len(value) > MAX_ENTRIES:
        raise ValueError(f"{len(value)} entries are too many; at most {MAX_ENTRIES} are read")
    return value


# Of a list or mapping that people write; looked at before what is in it is.
MAX_ENTRIES = 256
# Names that a message lists.
_SHOWN = 20
MOST_WORDS = BeforeValidator(_not_too_many)
Words = Annotated[tuple[str, ...], MOST_WORDS]
LayerPattern = Annotated[str, AfterValidator(lambda value: checked(check_pattern, value))]
LayerPatterns = Annotated[tuple[LayerPattern, ...], MOST_WORDS]


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases and with YAML 1.2's idea of what a number is."""

    yaml_implicit_resolvers = {}  # (PyYAML's own hook; filled below)

    nodes = 0
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse what takes long, and `&name` and `*name`: a small file could hold a huge one."""
        self.nodes += 1
        if self.nodes > MAX_NODES or self.depth == MAX_DEPTH:
            raise yaml.YAMLError(
                f"it may hold {MAX_NODES} entries, nested at most {MAX_DEPTH} deep"
            )
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError("anchors and aliases are not allowed")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice, of which YAML would keep the last."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        word, count = max(keys.items(), key=lambda item: item[1], default=("", 0))
        if count > 1:
            raise yaml.YAMLError(f"'{word}' stands twice")
        return super().construct_mapping(node, deep)


class _PlainDumper(yaml.SafeDumper):
    """SafeDumper that also puts quotes around text such as `1e3`, a number to our reader alone."""

    def ignore_aliases(self, data: object) -> bool:
        """Write a value that stands twice twice, since our reader knows no aliases."""
        return True


for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", ["n", "~", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    for _kind in (_PlainLoader, _PlainDumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
        )


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Inside other quotes the next-line character, a line break to YAML, would be read as a space.
    style = '"' if "\x85" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_PlainDumper.add_representer(str, _represent_text)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(node.value)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)


_PlainLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_PlainLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def find_document(name: str | Path, known: dict[str, Path], what: str) -> Path:
    """The file that a name or a path ending in .yaml stands for.

    Args:
        known: files that can be named, by name.
        what: the kind of document, for the message.

    Raises:
        RecipeError: no such name; the message gives the nearest.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    if str(name) not in known:
        near = did_you_mean(str(name), known) or "."
        # A page of names helps nobody.
        few = len(known) <= _SHOWN
        listed = ", ".join(known) if few else f"those of `prunezero list {what}s`"
        raise RecipeError(
            f"'{name}' is not a known {what}{near} Known: {listed}; or give the path of a .yaml "
            "file."
        )
    return known[str(name)]


def read_document(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        RecipeError: no readable file, too large, or not a mapping of plain data.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecipeError(f"{path} is larger than {MAX_BYTES // 1024} KiB; this is no recipe")
        data = copy.deepcopy(_parsed(raw.decode("utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {reason(error, path)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not plain YAML: {reason(error)}") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{path} must hold 'key: value' lines")
    return data


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """What the text says, not to be changed: a search reads all of `baselines/` more than once."""
    return yaml.load(text, Loader=_PlainLoader)


def write_document(data: dict[str, Any], path: Path) -> None:
    """Write a mapping as YAML that `read_document` reads back to the same, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(to_yaml(data), path)


def to_yaml(data: dict[str, Any]) -> str:
    """The mapping as YAML text, in the order of its keys."""
    return yaml.dump(data, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=100)


class Document(BaseModel):
    """What is kept as one YAML file."""

    def to_yaml(self) -> str:
        """What its file holds; keys left at nothing are left out."""
        return to_yaml(self._fields())

    def save(self, path: Path) -> None:
        """Write it to a file that is read back to an equal one.

        Raises:
            OutputError: the file cannot be written.
        """
        write_document(self._fields(), path)

    def _fields(self) -> dict[str, Any]:
        fields = self.model_dump(mode="json", by_alias=True)
        return {key: value for key, value in fields.items() if value not in ("", [], {})}


def validated(kind: type[Model], data: dict[str, Any], source: str) -> Model:
    """The data as `kind`, or one error that lists every fault by source, key and nearest word.

    Raises:
        RecipeError: a key is unknown, missing, or holds what it may not.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        faults = [f"{_fault(kind, fault):.500}" for fault in error.errors()]
        told = faults[:_MOST_FAULTS]
        if len(faults) > len(told):
            told.append(f": and {len(faults) - len(told)} faults more")
        raise RecipeError("\n".join(f"{source}{fault}" for fault in told)) from error


def _fault(kind: type[BaseModel], fault: Any) -> str:
    """What is wrong, after the name of the source: the key where one is at fault, and why."""
    key = ".".join(str(part) for part in fault["loc"])
    return f"{f', {key}' if key else ''}: {_reason(kind, fault, key)}"


def _reason(kind: type[BaseModel], fault: Any, key: str) -> str:
    known = [field.alias or name for name, field in kind.model_fields.items()]
    match fault["type"]:
        case "extra_forbidden" if key in ELSEWHERE:
            return ELSEWHERE[key]
        case "extra_forbidden":
            near = did_you_mean(key, known) or "."
            return f"not a known key{near} Known: {', '.join(known)}."
        case "missing":
            return "this key must be there"
        case "literal_error":
            words = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
            near = did_you_mean(str(fault["input"]), words) or "."
            known_words = ", ".join(words) or fault["ctx"]["expected"]
            return f"'{fault['input']}' is not a known word{near} Known: {known_words}."
        case "value_error":
            return str(fault["ctx"]["error"])
    return fault_in_words(fault)


def fault_in_words(fault: Any) -> str:
    """What pydantic found wrong with a value, and the value."""
    return f"{fault['msg'][0].lower()}{fault['msg'][1:]}, but got {fault['input']!r:.60}"
