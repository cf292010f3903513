"""Faults of a recipe in its author's words: what the YAML parser and the validation of types found."""

from __future__ import annotations

import re
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
_PATTERNS = {"^[a-z]{2}$": "two small letters, such as en"}
"""The words for what a text must look like, by the pattern in its type."""
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def explain_yaml(error: yaml.YAMLError, text: str) -> tuple[int | None, str]:
    """Return the line of a fault in ``text``, from 1, and what is wrong with it and how to mend it."""
    problem = str(getattr(error, "problem", None) or str(error).splitlines()[0])
    context = str(getattr(error, "context", None) or "")
    line, begun = _line(getattr(error, "problem_mark", None)), _line(getattr(error, "context_mark", None))
    if "'\\t'" in problem:
        return line, "a tab cannot indent a line; use spaces"
    if "scanning a quoted" in context or "double-quoted" in context:
        if "end of stream" in problem or "document separator" in problem:
            return begun, "a quote that opens in this line is never closed; close it"
        return line, "in double quotes a backslash must be doubled; or take single quotes"
    if "flow" in context:
        return line, f"a comma or a closing bracket is missing; the bracket opens in line {begun}"
    if "could not find expected ':'" in problem:
        return begun, "a key without a colon and a space; write key: value"
    if "mapping values are not allowed" in problem:
        if (above := _without_colon(text, line)) is not None:
            return above, "a colon is missing at the end of the line"
        return (
            line,
            "a colon is not expected here; align the line with its neighbours, or put text with a colon in quotes",
        )
    if "expected <block end>" in problem and re.search(r"found '[]}]'", problem):
        return line, "there is a closing bracket too many"
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
    if kind == "string_pattern_mismatch":
        pattern = context["pattern"]
        return f"must be {_PATTERNS.get(pattern, f'text that matches {pattern}')}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "missing":
        return "is missing; set it"
    if (expected := _EXPECTED.get(kind.split("_")[0])) is not None:
        return f"must be {expected}"
    message = str(item["msg"])
    return f"{message[0].lower()}{message[1:]}"


def shown_value(value: Any) -> str:
    """Return a value as its author wrote it, or nearly so; nothing for a whole block."""
    if value is None:
        return ", and nothing is given"
    if isinstance(value, bool):
        return f", not {str(value).lower()}"
    return "" if isinstance(value, dict) else ", not a list" if isinstance(value, list) else f", not {value!r}"


def mend_of_block(value: Any) -> str:
    """Return how to write the block of settings in whose place a value was given."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\w+):(\S.*)", value)):
        return f"; a space is missing after the colon: write {found[1]}: {found[2]}"
    if isinstance(value, str) and (found := re.fullmatch(r"([a-z_]+) +(\S.*)", value)):
        return f"; a colon is missing: write {found[1]}: {found[2]}"
    if isinstance(value, list):
        return "; leave out the dashes"
    return "; write its settings in the lines below it, further to the right"


def _without_colon(text: str, line: int | None) -> int | None:
    """Return the number of the line before ``line`` if it is a single word at less indentation, else None."""
    lines = text.splitlines()[: (line or 1) - 1]
    above = next((number for number in range(len(lines), 0, -1) if lines[number - 1].strip()), None)
    if line is None or above is None or re.fullmatch(r" *[\w-]+ *", lines[above - 1]) is None:
        return None
    here = text.splitlines()[line - 1]
    return above if len(lines[above - 1]) - len(lines[above - 1].lstrip()) < len(here) - len(here.lstrip()) else None


def _line(mark: Any) -> int | None:
    return None if mark is None else int(mark.line) + 1
