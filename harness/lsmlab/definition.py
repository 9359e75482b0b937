"""Reading the YAML files that people write: strict, every error with file and line.

A definition may `extends:` another of the same kind: mappings are merged key by key, `key: null` takes a key away,
everything else is replaced.
Paths inside a file are relative to that file, also after merging.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from lsmlab.errors import DefinitionError

Location = tuple[str | int, ...]
Finder = Callable[[str], Path | None]
"""Turns an id into its file, or None."""
Model = TypeVar("Model", bound="Definition")

MAX_DEPTH = 20
MAX_BYTES = 1 << 20  # a definition is read by people; a larger file is something else


class Strict(BaseModel):
    """Base of all models: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Definition(Strict):
    """Base of what a whole file describes."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(slots=True)
class RawDefinition:
    """A file's plain data, with the origin of each key."""

    data: dict[str, Any]
    origins: dict[Location, Origin] = field(default_factory=dict)

    def origin(self, loc: Location, fallback: Path) -> Origin:
        """The origin of `loc`, or of the nearest parent that has one."""
        for end in range(len(loc), -1, -1):
            found = self.origins.get(loc[:end])
            if found is not None:
                return found
        return Origin(fallback, 1)


def peek_kind(path: Path) -> str | None:
    """The `kind:` of a YAML file, or None where it has none. Reads the head of the file only; never raises."""
    try:
        with path.open("rb") as handle:
            head = handle.read(4096).decode("utf-8", "replace")
    except OSError:
        return None
    for line in head.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "kind" and not key[:1].isspace():
            return value.split("#")[0].strip().strip("'\"") or None
    return None


def read_raw(path: Path) -> RawDefinition:
    """One file's data and origins. Raises DefinitionError with file and line for whatever is not plain YAML."""
    try:
        with path.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise DefinitionError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) > MAX_BYTES:
        raise DefinitionError(f"{path}: more than {MAX_BYTES} bytes; a definition is a text that people read")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DefinitionError(f"{path}: not UTF-8 text at byte {error.start}") from error
    parsed = _parsed(path, text)
    return RawDefinition(copy.deepcopy(parsed.data), dict(parsed.origins))


@functools.lru_cache(maxsize=256)
def _parsed(path: Path, text: str) -> RawDefinition:
    """What `read_raw` gives copies of: a base is parsed once, however many build on it."""
    try:
        # Nodes, not objects: each has its line, and no tag can make anything but plain data
        document = YAML(typ="safe", pure=True).compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise DefinitionError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from error
    except (YAMLError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise DefinitionError(f"{path}:1: not valid YAML: {error}") from error
    if not isinstance(document, MappingNode):
        names = {SequenceNode: "a list", ScalarNode: "a text", type(None): "nothing"}
        raise DefinitionError(f"{path}:1: expected a mapping of keys to values, found {names[type(document)]}")
    result = RawDefinition({})
    result.data = _plain(document, (), path, result.origins)
    result.origins[()] = Origin(path, 1)
    return result


def _plain(node: Any, loc: Location, path: Path, origins: dict[Location, Origin]) -> Any:
    where = f"{path}:{node.start_mark.line + 1}"
    if node.anchor is not None:
        raise DefinitionError(f"{where}: &{node.anchor}: anchors and aliases are not used here; write the value out")
    if len(loc) > MAX_DEPTH:
        raise DefinitionError(f"{where}: nested more than {MAX_DEPTH} deep")
    if isinstance(node, MappingNode):
        plain: dict[str, Any] = {}
        for key_node, value in node.value:
            key = _scalar(key_node, path) if isinstance(key_node, ScalarNode) else None
            at = Origin(path, key_node.start_mark.line + 1)
            if not isinstance(key, str) or key == "<<":
                found = (
                    "a merge" if key == "<<" else _found(key) if isinstance(key_node, ScalarNode) else "a collection"
                )
                raise DefinitionError(f"{at}: expected a text as key, found {found}")
            if key in plain:
                raise DefinitionError(f'{at}: found duplicate key "{key}": each key may stand once')
            origins[(*loc, key)] = at
            plain[key] = _plain(value, (*loc, key), path, origins)
        return plain
    if isinstance(node, SequenceNode):
        items = []
        for index, value in enumerate(node.value):
            origins[(*loc, index)] = Origin(path, value.start_mark.line + 1)
            items.append(_plain(value, (*loc, index), path, origins))
        return items
    return _scalar(node, path)


def _scalar(node: ScalarNode, path: Path) -> Any:
    """A plain value by YAML 1.2's core schema; a date is the text that was written."""
    tag = str(node.tag).rpartition(":")[2] if str(node.tag).startswith("tag:yaml.org,2002:") else str(node.tag)
    text = str(node.value)
    try:
        if tag == "null":
            return None
        if tag == "bool":
            return {"true": True, "false": False}[text.lower()]
        if tag == "int":
            return int(text.replace("_", ""), 0 if text.lstrip("+-")[:2].lower() in {"0x", "0o"} else 10)
        if tag == "float":
            return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    except (KeyError, ValueError) as error:
        raise DefinitionError(f"{path}:{node.start_mark.line + 1}: {text[:40]!r} is not {tag}") from error
    if tag in {"str", "timestamp"}:
        return text
    raise DefinitionError(f"{path}:{node.start_mark.line + 1}: {tag}: tags are not used here; write plain values")


def _found(value: Any) -> str:
    names = {bool: "true/false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "a mapping"}
    if value is None:
        return "nothing"
    name = next((names[t] for t in names if isinstance(value, t)), type(value).__name__)
    text = repr(value)
    return f"{name} ({text if len(text) <= 40 else text[:37] + '...'})" if not isinstance(value, (list, dict)) else name


def merge(base: RawDefinition, over: RawDefinition) -> RawDefinition:
    """`over` on top of `base`: mappings key by key, everything else replaced."""
    data, origins = _merge(base.data, over.data, (), base, over)
    return RawDefinition(data, {**origins, (): over.origins[()]})


def _merge(
    low: dict[str, Any], high: dict[str, Any], loc: Location, base: RawDefinition, over: RawDefinition
) -> tuple[dict[str, Any], dict[Location, Origin]]:
    data: dict[str, Any] = {}
    origins: dict[Location, Origin] = {}
    for key in [*low, *(k for k in high if k not in low)]:
        here = (*loc, key)
        if key in high and high[key] is None and key in low:
            continue  # `key: null` takes away what the base has
        if key in high and key in low and isinstance(low[key], dict) and isinstance(high[key], dict):
            data[key], inner = _merge(low[key], high[key], here, base, over)
            origins[here] = over.origins[here]
            origins |= inner
            continue
        source = over if key in high else base
        data[key] = (high if key in high else low)[key]
        origins |= {at: o for at, o in source.origins.items() if at[: len(here)] == here}
    return data, origins


def resolve(
    path: Path,
    kind: str,
    find: Finder,
    file_keys: frozenset[str],
    *,
    _chain: tuple[Path, ...] = (),
) -> RawDefinition:
    """Read `path`, follow `extends:` and make the values of `file_keys` absolute.

    `find` turns an id into a file, or None. Raises DefinitionError for a wrong kind, an unknown base or a circle.
    """
    raw = read_raw(path)
    found = raw.data.get("kind")
    if found != kind:
        raise DefinitionError(
            f"{raw.origin(('kind',), path)}: kind: expected {kind!r}, found {found!r}",
            hint=f"A file of this sort starts with `kind: {kind}`.",
        )
    _absolute(raw.data, path.parent, file_keys)
    base_id = raw.data.pop("extends", None)
    if base_id is None:
        return raw
    where = raw.origin(("extends",), path)
    base_path = find(base_id) if isinstance(base_id, str) else None
    if base_path is None:
        raise DefinitionError(f"{where}: extends: no {kind.rpartition('/')[2]} named {base_id!r}")
    chain = (*_chain, path.resolve())
    if base_path.resolve() in chain:
        raise DefinitionError(f"{where}: extends: {base_id!r} leads back to this file")
    return merge(resolve(base_path, kind, find, file_keys, _chain=chain), raw)


def _absolute(node: Any, folder: Path, file_keys: frozenset[str]) -> None:
    if isinstance(node, list):
        for item in node:
            _absolute(item, folder, file_keys)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in file_keys and isinstance(value, str):
            node[key] = _joined(folder, value)
        elif key in file_keys and isinstance(value, list):
            node[key] = [_joined(folder, v) if isinstance(v, str) else v for v in value]
        else:
            _absolute(value, folder, file_keys)


def _joined(folder: Path, name: str) -> str:
    return os.path.normpath(folder.resolve() / name)


def validate(model: type[Model], raw: RawDefinition, path: Path) -> Model:
    """`raw` as a frozen model, or a DefinitionError that lists every fault with its file and line."""
    try:
        # Strict JSON rules: texts become enumerations, paths and tuples, and nothing else is converted
        return model.model_validate_json(json.dumps(raw.data))
    except ValidationError as error:
        errors = error.errors()
        # A faulty item drops out of its list, and pydantic then finds the list too short: not the file's fault
        inside = {tuple(e["loc"][:n]) for e in errors for n in range(len(e["loc"]))}
        faults = [
            _fault(e, raw, path, model) for e in errors if e["type"] != "too_short" or tuple(e["loc"]) not in inside
        ]
        raise DefinitionError("\n".join(dict.fromkeys(faults))) from error


def _fault(error: Mapping[str, Any], raw: RawDefinition, path: Path, model: type[BaseModel]) -> str:
    loc: Location = tuple(error["loc"])
    if loc[-1:] == ("[key]",):
        loc = loc[:-1]
        known_keys = error.get("ctx", {}).get("expected", "another key")
        return f"{raw.origin(loc, path)}: {'.'.join(map(str, loc))}: unknown key; expected {known_keys}"
    where = raw.origin(loc, path)
    name = ".".join(str(part) for part in loc) or "file"
    kind = error["type"]
    if kind == "extra_forbidden":
        parent = _model_at(model, loc[:-1])
        known = sorted(f.alias or n for n, f in parent.model_fields.items()) if parent else []
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
        return f"{where}: {name}: unknown key; {advice}"
    if kind == "missing":
        return f"{where}: {name}: is missing and is needed"
    if kind == "enum" or kind.startswith("literal"):
        return f"{where}: {name}: expected {error['ctx']['expected']}, found {_found(error['input'])}"
    message = str(error["msg"]).removeprefix("Value error, ")
    placed = re.match(r"([a-z_]+(?:\.[a-z_0-9]+)*): (.*)", message, re.DOTALL) if not loc else None
    if placed:  # a fault between parts names its place itself
        parts = placed[1].split(".")
        loc, name, message = tuple(int(p) if p.isdigit() else p for p in parts), placed[1], placed[2]
        where = raw.origin(loc, path)
    if kind.endswith("_type"):
        wanted = message.removeprefix("Input should be ").removeprefix("a valid ")
        article = "" if wanted.startswith(("a ", "an ")) else "an " if wanted[:1] in "aeiou" else "a "
        return f"{where}: {name}: expected {article}{wanted}, found {_found(error['input'])}"
    return f"{where}: {name}: {message}"


def _model_at(model: type[BaseModel], loc: Location) -> type[BaseModel] | None:
    current: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int):
            continue
        if current is None:
            return None
        info = current.model_fields.get(part) or next(
            (f for f in current.model_fields.values() if f.alias == part), None
        )
        if info is None:
            continue  # the key of a mapping: its values' model was already found
        current = next(_models_in(info.annotation), None)
    return current


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def unknown_name(what: str, name: str, known: list[str]) -> DefinitionError:
    """The error for a name that stands for nothing, with the nearest that does."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known) or 'none'}."
    return DefinitionError(f"unknown {what} {name!r}", hint=hint)


def digest_of(*parts: bytes | str) -> str:
    """SHA-256 over `parts`, each framed by its length so that no two lists collide; hexadecimal."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()


def files_below(folder: Path) -> list[bytes | str]:
    """Of all below `folder`, in order: its path there, what it is, and what is in it; for `digest_of`."""
    parts: list[bytes | str] = []
    for path in sorted(folder.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        # The owner's bits alone: a checkout has those of whoever cloned it elsewhere
        kind = f"-> {path.readlink()}" if path.is_symlink() else f"{path.stat().st_mode & 0o40700:o}"
        parts += [str(path.relative_to(folder)), kind, path.read_bytes() if plain else b""]
    return parts
