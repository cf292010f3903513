"""Loading a recipe: YAML with ``extends`` and ``--set``, validated; errors name file, line, key and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dalle_cli.config.faults import explain_type, explain_yaml, mend_of_block, shown_value
from dalle_cli.config.schema import Recipe
from dalle_cli.config.shipped import shipped_recipe, shipped_recipes
from dalle_cli.errors import UserError

Key = tuple[str, ...]
MOST_EXTENDS = 20
"""Largest number of recipes in a chain of ``extends``."""
MOST_SETTINGS = 10_000
"""Largest number of settings in a file; with aliases, a few lines can stand for billions."""


@dataclass
class _Tree:
    """Nested plain values, and for each key the file and line that set it last."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and validate a recipe; ``overrides`` are settings to change, ``a.b=value`` as for ``--set``.

    Raises:
        UserError: one line for each mistake, with file, line, key and the mend.
    """
    tree = _read(path, seen=())
    for override in overrides:
        _override(tree, override)
    # A block that is written in part keeps the other defaults of its stage, not the defaults of the block's class.
    values = Recipe().model_dump()
    _merge(values, tree.values)
    _derive(values, tree)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item, tree, path) for item in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def _derive(values: dict[str, Any], tree: _Tree) -> None:
    """Set the sizes that follow from others, where the recipe leaves them out."""
    model, dvae = (
        values[stage].get("model") if isinstance(values[stage], dict) else None for stage in ("prior", "dvae")
    )
    if not isinstance(model, dict) or not isinstance(dvae, dict):
        return  # a value of a wrong type, which validation explains
    side, image_size = dvae.get("downsampling"), values["image_size"]
    sizes = {"d_model": (model.get("heads"), model.get("d_head")), "grid": (image_size, side)}
    for name, (a, b) in sizes.items():
        if ("prior", "model", name) not in tree.places and type(a) is int and type(b) is int and b > 0:
            model[name] = a * b if name == "d_model" else a // b


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML with every key; ``load_recipe`` reads the same settings back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _read(path: Path, seen: tuple[Path, ...]) -> _Tree:
    try:
        resolved = path.resolve()
    except (ValueError, RuntimeError) as error:  # half of a letter in the name, or links that lead in a circle
        raise UserError(f"{str(path)!r}: cannot be read as a recipe: {error}") from None
    if len(seen) > MOST_EXTENDS:
        raise UserError(f"{seen[0]}: 'extends' leads through more than {MOST_EXTENDS} recipes; join some of them")
    if resolved in seen:
        raise UserError(
            f"{path}: 'extends' leads back to the recipe itself: {' -> '.join(str(p) for p in (*seen, resolved))}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path.parent == Path() and (shipped := shipped_recipe(path.name)) is not None:
            return _read(shipped, seen)
        raise UserError(f"{path}: no such recipe{_near_recipes(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a recipe, which is a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8, so no recipe; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a recipe: {error.strerror}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        line, problem = explain_yaml(error, text)
        raise UserError(f"{path}{'' if line is None else f':{line}'}: {problem}") from None
    except RecursionError:
        raise UserError(f"{path}: its settings are nested too deeply; write fewer brackets") from None
    own = _Tree()
    if node is not None:
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:1: not a recipe; write keys and settings, such as name: mine")
        own.values = _plain(node, (), path, own.places)
    base = own.values.pop("extends", None)
    if base is None:
        return own
    if not isinstance(base, str) or "\0" in base:
        raise UserError(f"{own.places[('extends',)]}: extends: name one recipe by its path, relative to this file")
    place = path.parent / base
    if not place.exists() and (shipped := shipped_recipe(base)) is not None:
        place = shipped
    tree = _read(place, (*seen, resolved))
    _merge(tree.values, own.values)
    tree.places.update(own.places)
    return tree


def _plain(node: yaml.MappingNode, prefix: Key, path: Path, places: dict[Key, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{place}: a key must be a word; put text that begins with a bracket in quotes")
        name = str(key_node.value)
        key = (*prefix, name)
        if len(places) >= MOST_SETTINGS:
            raise UserError(f"{place}: more than {MOST_SETTINGS} settings, counted with those of aliases")
        if name in values:
            raise UserError(f"{place}: {'.'.join(key)}: written twice; keep one of the two")
        places[key] = place
        if isinstance(value_node, yaml.MappingNode):
            values[name] = _plain(value_node, key, path, places)
        else:
            try:
                values[name] = yaml.SafeLoader("").construct_object(value_node, deep=True)
            except Exception as error:  # tags such as !!int on other text raise errors of many kinds
                problem = getattr(error, "problem", None) or str(error) or type(error).__name__
                raise UserError(f"{place}: {'.'.join(key)}: not a plain value: {problem}") from None
    return values


def _merge(base: dict[str, Any], over: dict[str, Any]) -> None:
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            _merge(base[name], value)
        else:
            base[name] = value


def _override(tree: _Tree, override: str) -> None:
    dotted, equals, text = override.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        raise UserError(f"--set {override}: write it as key.key=value, such as --set prior.training.updates=100")
    if not override.isascii() and override != override.encode("utf-8", "replace").decode():
        raise UserError(f"--set {override}: is not UTF-8; rename the file or folder")
    try:
        value = yaml.safe_load(text)
    except Exception:  # see _plain
        raise UserError(f"--set {override}: the value is not valid YAML") from None
    at = tree.values
    for name in key[:-1]:
        at = at.setdefault(name, {})
        if not isinstance(at, dict):
            raise UserError(f"--set {override}: {name} holds a value, not a block of settings")
    at[key[-1]] = value
    tree.places[key] = f"--set {override}"


def _explain(item: Any, tree: _Tree, path: Path) -> str:
    key = tuple(str(part) for part in item["loc"])
    while key and key not in tree.places and key[:-1] in tree.places:
        key = key[:-1]
    place = tree.places.get(key) or _place_within(tree, key) or str(path)
    name = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] == "extra_forbidden":
        key_and_value = str(item["loc"][-1]).partition(":")
        if key_and_value[1]:
            return f"{place}: {name}: a space is missing after the colon; write {': '.join(key_and_value[::2])}"
        return f"{place}: {name}: unknown key{_suggest(tuple(item['loc']))}"
    given = item.get("input")
    shown = "" if isinstance(given, BaseModel) else shown_value(given)
    if item["type"] == "value_error":  # raised for a block; its message begins with the key it is about
        message = str(item["msg"]).removeprefix("Value error, ")
        about = (*map(str, item["loc"]), *message.split()[0].split("."))
        return f"{tree.places.get(about, place)}: {name}: {message}"
    mend = mend_of_block(given) if item["type"] == "model_type" else ""
    return f"{place}: {name}: {explain_type(item)}{shown}{mend}"


def _place_within(tree: _Tree, key: Key) -> str | None:
    """Return the place of the last key written inside a block, where a mistake of the whole block is shown."""
    inside = [place for other, place in tree.places.items() if other[: len(key)] == key]
    return inside[-1] if inside else None


def _suggest(location: tuple[Any, ...]) -> str:
    model: Any = Recipe
    for part in location[:-1]:
        candidates = [model.model_fields[part].annotation] if part in model.model_fields else []
        candidates += list(get_args(candidates[0])) if candidates else []
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return ""
    known, name = list(model.model_fields), str(location[-1])
    if near := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean '{near[0]}'?"
    if elsewhere := [place for place in _places_of(Recipe(), name, "") if place.count(".") <= len(location) + 1]:
        return f"; it belongs in a block: {' or '.join(elsewhere)}"
    return f"; known here: {', '.join(known)}"


def _places_of(block: BaseModel, name: str, prefix: str) -> list[str]:
    """Return the dotted keys that end in ``name``, of a block and of those below it."""
    found = [f"{prefix}{name}"] if prefix and name in type(block).model_fields else []
    for key, value in block:
        if isinstance(value, BaseModel):
            found += _places_of(value, name, f"{prefix}{key}.")
    return found


def _near_recipes(path: Path) -> str:
    names = sorted(str(p) for p in path.parent.glob("*") if p.suffix in (".yaml", ".yml"))
    names += shipped_recipes()
    near = difflib.get_close_matches(str(path), names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"
