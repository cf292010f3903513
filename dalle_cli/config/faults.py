"""Faults of a recipe in its author's words: what the YAML parser and the validation of types found."""

from __future__ import annotations

from typing import Any

import yaml

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text; put it in quotes",
    "list": "a list, such as [a, b]",
    "dict": "a block of settings",
    "model": "a block of settings",
}
"""The words for what a value must be, by the first word of pydantic's type of error."""
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def explain_yaml(error: yaml.YAMLError) -> tuple[int | None, str]:
    """Return the line of a fault, from 1, and what is wrong with it and how to mend it."""
    problem = str(getattr(error, "problem", None) or str(error).splitlines()[0])
    context = str(getattr(error, "context", None) or "")
    line, begun = _line(getattr(error, "problem_mark", None)), _line(getattr(error, "context_mark", None))
    if "'\\t'" in problem:
        return line, "a tab cannot indent a line; use spaces"
    if "scanning a quoted" in context or "double-quoted" in context:
        if "end of stream" in problem or "document separator" in problem:
            return begun, "a quote that opens in this line is never closed; close it"
        return line, f"{problem}; in double quotes a backslash must be doubled"
    if "flow" in context:
        return line, f"a comma or a closing bracket is missing; the bracket opens in line {begun}"
    if "could not find expected ':'" in problem:
        return begun, "a key without a colon and a space; write key: value"
    if "mapping values are not allowed" in problem:
        return (
            line,
            "a colon is not expected here; align the line with its neighbours, or put text with a colon in quotes",
        )
    if "expected <block end>" in problem:
        return line, f"the line is indented otherwise than the block that begins in line {begun}; align them"
    if "cannot start any token" in problem:
        return line, f"{problem.removeprefix('found ').split(' that')[0]} cannot begin a value; put it in quotes"
    if "alias" in context or "undefined alias" in problem:
        return line, "a value that begins with * is taken for an alias; put it in quotes"
    return line, f"not valid YAML: {problem}"


def explain_type(item: Any) -> str:
    """Return what a value that pydantic refused must be; ``item`` is one of a ValidationError's ``errors``."""
    kind, context = str(item["type"]), item.get("ctx", {})
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"must be {words} {context[key]}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "missing":
        return "is missing; set it"
    if (expected := _EXPECTED.get(kind.split("_")[0])) is not None:
        return f"must be {expected}"
    message = str(item["msg"])
    return f"{message[0].lower()}{message[1:]}"


def _line(mark: Any) -> int | None:
    return None if mark is None else int(mark.line) + 1
