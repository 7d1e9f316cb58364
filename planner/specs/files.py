"""Read YAML and JSON with positions, check them against a spec, and find shipped models and profiles by name.

Every problem of a file is reported at once, each with file, line and column. YAML is 1.2 (`1e-4` is a number, `no` is
text), duplicate keys are refused.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from planner.errors import InputError, Location, Problem, input_error
from planner.specs import huggingface
from planner.specs.hardware import HardwareProfile
from planner.specs.model import Model

S = TypeVar("S", bound=BaseModel)
Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A parsed file: plain data, and where each value stands."""

    path: str
    data: Any
    text: str
    positions: dict[Loc, tuple[int, int]] = field(default_factory=dict)

    def location(self, loc: Loc) -> Location:
        """The place of `loc`, or of the nearest enclosing value that has one."""
        while loc and loc not in self.positions:
            loc = loc[:-1]
        line, col = self.positions.get(loc, (1, 1))
        return Location(self.path, line, col)

    @property
    def digest(self) -> str:
        """SHA-256 of the file's text."""
        return "sha256:" + hashlib.sha256(self.text.encode()).hexdigest()


# ---- parsing -----------------------------------------------------------------------------------------------------


def read_text(path: str | Path) -> str:
    """The file's text, or an input error that names it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _no_file(path) from None
    except (OSError, UnicodeDecodeError) as error:
        why = str(error).partition("] ")[2] or str(error)
        raise input_error("PLN101", f"cannot read {path}", why, "give a readable text file", Location(str(path))) from None


def _no_file(path: str | Path) -> InputError:
    near = []
    parent = Path(path).parent
    if parent.is_dir():
        near = difflib.get_close_matches(Path(path).name, [p.name for p in parent.iterdir()], n=1)
    fix = f"did you mean {parent / near[0]}?" if near else "check the path"
    return input_error("PLN101", f"{path} does not exist", "no such file", fix, Location(str(path)))


def parse_document(path: str | Path) -> Document:
    """Parse a `.json` file as JSON and anything else as YAML 1.2. Raises InputError at the offending place."""
    text = read_text(path)
    if Path(path).suffix == ".json":
        try:
            return Document(str(path), json.loads(text, object_pairs_hook=_no_duplicates), text)
        except json.JSONDecodeError as error:
            place = Location(str(path), error.lineno, error.colno)
            raise input_error("PLN102", "not valid JSON", error.msg, "correct the syntax at this place", place) from None
        except RecursionError:
            raise input_error("PLN102", "nested too deeply", "", "", Location(str(path), 1, 1)) from None
        except _DuplicateKey as error:
            place = Location(str(path), *_second_place(text, str(error)))
            raise input_error("PLN102", f"key '{error}' appears twice", "", "keep one of them", place) from None
    return _parse_yaml(str(path), text)


class _DuplicateKey(ValueError):
    pass


def _second_place(text: str, key: str) -> tuple[int, int]:
    """Line and column of the second occurrence of a JSON key, as well as text alone tells."""
    word = json.dumps(key)
    at = text.find(word, text.find(word) + 1)
    return text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKey(key)
        result[key] = value
    return result


def _parse_yaml(path: str, text: str) -> Document:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="rt")
    if any(line.startswith("%") for line in text.splitlines()[:3]):
        raise input_error(
            "PLN102", "YAML directives are not read", "files are YAML 1.2", "remove the line", Location(path, 1, 1)
        )
    try:
        tree = yaml.load(text)
    except (RecursionError, ValueError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise input_error("PLN102", "not valid YAML", why, "", Location(path, 1, 1)) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Location(path, mark.line + 1, mark.column + 1) if mark else Location(path, 1, 1)
        what = "a key appears twice" if "duplicate" in str(error.problem) else "not valid YAML"
        why = " ".join(str(error.problem or error.context or "").split())
        raise input_error("PLN102", what, why, "correct the syntax at this place", place) from None
    except YAMLError as error:
        raise input_error("PLN102", "not valid YAML", str(error).splitlines()[0], "", Location(path, 1, 1)) from None
    positions: dict[Loc, tuple[int, int]] = {(): (1, 1)}
    if "*" in text and _weight(tree, {}) > 100_000:
        raise input_error("PLN102", "aliases multiply to a huge document", "", "write it out", Location(path, 1, 1))
    return Document(path, _plain(tree, (), positions), text, positions)


def _weight(node: Any, known: dict[int, int]) -> int:
    """Values that a tree has when its aliases are written out."""
    if id(node) not in known:
        known[id(node)] = 1
        items = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        known[id(node)] = 1 + sum(_weight(item, known) for item in items)
    return known[id(node)]


def _plain(node: Any, loc: Loc, positions: dict[Loc, tuple[int, int]]) -> Any:
    """Plain dicts, lists and scalars; fills `positions` with the place of each key or item."""
    if isinstance(node, dict):
        result = {}
        for key, value in node.items():
            # Keys that came through a YAML merge (<<) have no place of their own.
            line, col = (node.lc.data or {}).get(key, (node.lc.line, node.lc.col))[:2]  # type: ignore[attr-defined]
            positions[(*loc, key)] = (line + 1, col + 1)
            result[key] = _plain(value, (*loc, key), positions)
        return result
    if isinstance(node, list):
        for i, _ in enumerate(node):
            line, col = node.lc.data[i][:2]  # type: ignore[attr-defined]
            positions[(*loc, i)] = (line + 1, col + 1)
        return [_plain(value, (*loc, i), positions) for i, value in enumerate(node)]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def with_positions(document: Document) -> Document:
    """A JSON document with positions: JSON is YAML, so that the YAML reader finds them (only done for an error)."""
    if document.positions:
        return document
    try:
        return _parse_yaml(document.path, document.text)
    except InputError:
        return document


# ---- checking against a spec -------------------------------------------------------------------------------------


def build(spec: type[S], document: Document, data: Any = None) -> S:
    """The spec built from a document (from `data` when the document was merged). Raises InputError with all problems."""
    data = document.data if data is None else data
    if not isinstance(data, dict):
        place = Location(document.path, 1, 1)
        found = "the file is empty" if data is None else f"found {type(data).__name__}"
        raise input_error("PLN103", "expected keys and values", found, "", place)
    try:
        return spec.model_validate(data)
    except ValidationError as error:
        placed = with_positions(document)
        raise InputError(_one_a_place([_problem(spec, placed, e) for e in error.errors()])) from None


def _one_a_place(problems: list[Problem]) -> list[Problem]:
    """Alternatives of one union report one problem each at the same place: keep the first."""
    first: dict[tuple[str, int, int, str], Problem] = {}
    for problem in problems:
        place = problem.location
        key = (place.file, place.line, place.col, problem.what if problem.code in ("PLN104", "PLN105", "PLN108") else "")
        first.setdefault(key, problem)
    return list(first.values())


def _problem(spec: type[BaseModel], document: Document, error: Any) -> Problem:
    loc = _existing_loc(document, error["loc"])
    name = ".".join(str(p) for p in loc) or "file"
    place = document.location(loc)
    kind, shown = error["type"], _shown(error.get("input"))
    if kind == "invalid_key":
        return Problem("PLN106", f"{name}: keys are text", f"found {shown}", "quote it", place)
    if kind == "extra_forbidden":
        known = sorted(_fields_at(spec, loc[:-1]))
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        fix = f"did you mean '{near[0]}'?" if near else "remove it"
        return Problem("PLN104", f"{name}: unknown key", f"known keys are {', '.join(known)}", fix, place)
    if kind == "missing":
        return Problem("PLN105", f"{name}: missing", "this key is required", f"add '{loc[-1]}:'", place)
    if kind in ("literal_error", "enum"):
        expected = error["ctx"]["expected"]
        near = difflib.get_close_matches(str(error["input"]), expected.replace("'", "").replace(" or ", ", ").split(", "), n=1)
        fix = f"did you mean '{near[0]}'?" if near else f"use one of {expected}"
        return Problem("PLN106", f"{name}: {shown} is not a choice", f"expected {expected}", fix, place)
    if kind == "value_error":
        return Problem("PLN108", f"{name}: {error['msg'].removeprefix('Value error, ')}", "", "", place)
    if kind.endswith(("_type", "_parsing")):
        return Problem("PLN106", f"{name}: wrong type", f"{error['msg']}, found {shown}", "", place)
    return Problem("PLN107", f"{name}: {shown} is out of range", error["msg"], "", place)


def _existing_loc(document: Document, loc: Loc) -> Loc:
    """Drop the parts that pydantic adds for unions, which are not keys of the file."""
    if not document.positions:
        return loc
    kept: list[str | int] = []
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if (*kept, part) in document.positions or (last and part not in _UNION_TAGS and "[" not in str(part)):
            kept.append(part)
    return tuple(kept)


_UNION_TAGS = ("str", "int", "float", "bool")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, str) else f"'{value}'"
    return text if len(text) <= 60 else text[:57] + "..."


def _fields_at(spec: Any, loc: Loc) -> set[str]:
    """Known keys at a place of the spec: walks annotations through lists, dicts and unions."""
    kinds: list[Any] = [spec]
    for part in loc:
        following: list[Any] = []
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                if part in kind.model_fields:
                    following += _alternatives(kind.model_fields[str(part)].annotation)
            elif typing.get_origin(kind) in (list, dict, tuple):
                following += _alternatives(typing.get_args(kind)[-1])
        kinds = following
    return {name for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel) for name in kind.model_fields}


def _alternatives(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [a for arg in typing.get_args(annotation) for a in _alternatives(arg)]
    if typing.get_origin(annotation) is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    return [annotation]


# ---- shipped data ------------------------------------------------------------------------------------------------


def data_folder(kind: str) -> Path:
    """The folder of shipped `models` or `hardware_profiles`: inside the wheel, or beside the package when editable."""
    packaged = Path(str(resources.files("planner"))) / "_data" / kind
    if packaged.is_dir():
        return packaged
    checkout = Path(__file__).resolve().parents[2]
    return checkout / "examples" / "models" if kind == "models" else checkout / kind


def shipped(kind: str) -> dict[str, Path]:
    """Shipped files of a kind by name, in the order of their names."""
    return {p.stem: p for p in sorted(data_folder(kind).glob("*.yaml"))}


def _resolve(reference: str, kind: str, noun: str, relative_to: Path | None) -> Path:
    """A path as given, a path relative to a file that names it, or a shipped name."""
    names = shipped(kind)
    if reference in names:
        return names[reference]
    path = Path(reference)
    if relative_to is not None and not path.is_absolute() and (relative_to / path).exists():
        path = relative_to / path
    if path.exists() or path.suffix in (".yaml", ".yml", ".json"):
        return path
    near = difflib.get_close_matches(reference, list(names), n=3)
    fix = f"did you mean {' or '.join(near)}?" if near else f"shipped: {', '.join(names)}"
    raise input_error("PLN110", f"no {noun} called '{reference}'", "neither a file nor a shipped name", fix)


def load_model(reference: str, relative_to: Path | None = None, as_type: str | None = None) -> tuple[Model, Document]:
    """A model from our YAML, a Hugging Face config.json, or a shipped name. Raises InputError."""
    document = parse_document(_resolve(reference, "models", "model", relative_to))
    if huggingface.is_config(document.data):
        name = Path(document.path).resolve().parent.name if Path(document.path).stem == "config" else Path(document.path).stem

        def locate(*keys: str | int) -> Location:
            return with_positions(document).location(keys)

        data = huggingface.to_model_data(document.data, name, locate, as_type)
        return build(Model, Document(document.path, data, document.text)), document
    return build(Model, document), document


def load_hardware(reference: str, relative_to: Path | None = None) -> tuple[HardwareProfile, Document]:
    """A profile from a file or a shipped name, merged onto the one it extends. Raises InputError."""
    document = parse_document(_resolve(reference, "hardware_profiles", "hardware profile", relative_to))
    data, digests = _extended(document, ())
    if len(digests) > 1:
        load_hardware(str(document.data["extends"]), Path(document.path).parent)  # errors of the base name the base
    profile = build(HardwareProfile, document, data)
    merged = Document(document.path, data, "\n".join(digests), document.positions)
    return profile, document if len(digests) == 1 else merged


def _extended(document: Document, seen: tuple[str, ...]) -> tuple[Any, list[str]]:
    """The document's data on top of what it extends, and the texts that took part."""
    base_name = document.data.get("extends") if isinstance(document.data, dict) else None
    if base_name is None:
        return document.data, [document.text]
    place = document.location(("extends",))
    if not isinstance(base_name, str):
        raise input_error("PLN109", "extends: not a name", f"found {base_name!r}", "name a shipped profile or a file", place)
    try:
        path = _resolve(base_name, "hardware_profiles", "hardware profile", Path(document.path).parent)
    except InputError as error:
        raise InputError([p.at(place) for p in error.problems]) from None
    chain = (*seen, str(Path(document.path).resolve()))
    if str(path.resolve()) in chain:
        why = " extends ".join(Path(p).name for p in (*chain, str(path)))
        raise input_error("PLN109", "extends: a circle", why, "let one of them stand alone", place)
    base = parse_document(path)
    data, texts = _extended(base, chain)
    return _merge(data, document.data), [*texts, document.text]


def _merge(base: Any, top: Any) -> Any:
    """Mappings are merged key by key; anything else, lists included, is replaced."""
    if isinstance(base, dict) and isinstance(top, dict):
        return {k: _merge(base[k], top[k]) if k in base and k in top else top.get(k, base.get(k)) for k in [*base, *top]}
    return top
