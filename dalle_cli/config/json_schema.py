"""The JSON Schema of recipe files, by which editors complete keys and mark mistakes."""

from __future__ import annotations

import json
from typing import Any

from dalle_cli.config.schema import Recipe


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of what a recipe's file may say.

    A file says only what it changes, so that no key is required, and may begin from another one by ``extends``. A ramp
    may be a number.
    """
    schema = Recipe.model_json_schema()
    blocks = schema["$defs"]
    for block in (schema, *blocks.values()):
        block.pop("required", None)
    blocks["Ramp"] = {"anyOf": [{"type": "number"}, blocks["Ramp"]]}
    about = "recipe that this one begins from: its path, relative to this file, or the name of a shipped one"
    return {**schema, "properties": {"extends": {"type": "string", "description": about}, **schema["properties"]}}


def schema_text() -> str:
    """Return the schema as ``dalle show --schema`` prints it."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
