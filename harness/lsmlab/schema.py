"""JSON Schema of the files that people write, made from the models that check them: for editors.

A schema knows keys, types and values; what holds between keys only `lsmlab check` knows.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from lsmlab import lab, scenario
from lsmlab.container import spec
from lsmlab.definition import Definition

DIALECT = "https://json-schema.org/draft/2020-12/schema"
MODELS: dict[str, type[Definition]] = {"scenario": scenario.Scenario, "lab": lab.Lab}
PART = "Part"
"""What the name of a mapping ends in, in a file that builds on another: no key is needed there."""
EXTENDS = {
    "description": "The id of the one that this builds on: mappings are merged key by key, all else is replaced whole, "
    "and `key: null` takes a key away.",
    "type": "string",
}


def of(kind: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a file of `kind`, scenario or lab.

    With `extends`, every mapping may be incomplete, and a key may stand with nothing; lists are complete there too.
    """
    model = MODELS[kind]
    whole = model.model_json_schema(by_alias=True, mode="validation", ref_template="#/$defs/{model}")
    definitions: dict[str, Any] = whole.pop("$defs", {})
    definitions[model.__name__] = whole
    for described in _models(model):
        _describe(definitions.get(described.__name__, {}), described)
    parts: dict[str, Any] = {}
    _part(model.__name__, definitions, parts)
    root = parts[f"{model.__name__}{PART}"]
    root["properties"] = {"extends": EXTENDS, **root["properties"]}
    for own in ("kind", "id", "extends"):  # are never merged
        root["properties"][own] = EXTENDS if own == "extends" else whole["properties"][own]
    root["required"] = ["kind", "id", "extends"]
    return {
        "$schema": DIALECT,
        "title": f"lsmlab {kind}",
        "description": inspect.cleandoc(model.__doc__ or ""),
        "type": "object",
        "if": {"required": ["extends"]},
        "then": {"$ref": f"#/$defs/{model.__name__}{PART}"},
        "else": {"$ref": f"#/$defs/{model.__name__}"},
        "$defs": dict(sorted((definitions | parts).items())),
    }


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Every model of the modules that `model` and its parts come from."""
    for name in sorted({model.__module__, lab.__name__, scenario.__name__, spec.__name__}):
        for value in vars(sys.modules[name]).values():
            if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == name:
                yield value


def _describe(definition: dict[str, Any], model: type[BaseModel]) -> None:
    """Put the docstrings below the fields of `model` into its schema, of which pydantic sees only the class's own.

    The titles that it makes of the fields' names say nothing new, and editors show them.
    """
    properties = definition.get("properties", {})
    for shown in properties.values():
        shown.pop("title", None)
    for name, words in _field_docstrings(model):
        info = model.model_fields.get(name)
        shown = properties.get((info.alias if info else None) or name)
        if shown is not None:
            shown.setdefault("description", words)


def _field_docstrings(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Name and docstring of the fields of `model`, its own before those of its bases."""
    for owner in model.__mro__:
        if owner.__module__ != model.__module__:
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    yield name, inspect.cleandoc(words)


def _part(name: str, definitions: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """A reference to the mapping `name` as it may stand in a file that builds on another; made on first use."""
    part = f"{name}{PART}"
    if part not in parts:
        parts[part] = made = copy.deepcopy(definitions[name])
        made.pop("required", None)
        for key, value in made.get("properties", {}).items():
            made["properties"][key] = _taken_away_or(_merged(value, definitions, parts))
    return {"$ref": f"#/$defs/{part}"}


def _merged(node: dict[str, Any], definitions: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """`node` with each mapping in it made a part; what stands in a list is replaced whole, and stays."""
    changed = {key: value for key, value in node.items() if key != "default"}
    reference = str(node.get("$ref", "")).rpartition("/")[2]
    if definitions.get(reference, {}).get("type") == "object":
        return {**changed, **_part(reference, definitions, parts)}
    if "anyOf" in node:
        changed["anyOf"] = [_merged(choice, definitions, parts) for choice in node["anyOf"]]
    if isinstance(node.get("additionalProperties"), dict):
        changed["additionalProperties"] = _taken_away_or(_merged(node["additionalProperties"], definitions, parts))
    return changed


def _taken_away_or(node: dict[str, Any]) -> dict[str, Any]:
    rest = dict(node)
    about = {"description": rest.pop("description")} if "description" in rest else {}
    return {**about, "anyOf": [rest, {"type": "null"}]}
