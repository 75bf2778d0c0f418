"""What is wrong with a configuration, in the operator's words.

pydantic finds the problems and speaks of its own types; here each becomes one line that names the
file, the line, the key, what is expected and what was found. None of pydantic's wording gets out:
a kind of error that is not listed falls back to a plain sentence.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from lpechod.ops.toml import KeyPath, format_path, nearest_line, shown

# By pydantic's error type; the placeholders are those of its context.
_EXPECTED: Final = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than_equal": "at most {le}",
    "model_type": "a table",
    "tuple_type": "an array of tables (in two brackets: [[{key}]])",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend.

    Attributes:
        file: The path as it was given.
        line: Counted from 1; None when the problem is not on any line.
        key: The key's path, empty when the problem is about the file.
        message: What is wrong, and what to write instead.

    """

    file: str
    line: int | None
    key: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.key, self.message) if part)


class ConfigError(Exception):
    """The configuration can't be used; the operator has to change it.

    Attributes:
        problems: Everything that is wrong, in the order of the file. The text of the exception has
            one line for each.

    """

    problems: tuple[Problem, ...]

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(
            sorted(problems, key=lambda problem: (problem.line or 0, problem.key))
        )
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True, slots=True)
class Conflict:
    """Values that are valid alone but not together.

    Attributes:
        message: What does not fit, and the way out.
        at: The key to change, below the one whose validator finds this.
        because_of: The keys it conflicts with, from the top. The line of one of them is named when
            the first key is not in the file: then that is what the operator wrote.

    """

    message: str
    at: KeyPath = ()
    because_of: tuple[KeyPath, ...] = ()


def refuse(*conflicts: Conflict) -> None:
    """Raise what a validator found, if it found anything.

    Raises:
        ValidationError: There are conflicts; pydantic reports each one at its own key.

    """
    if not conflicts:
        return
    errors = [
        InitErrorDetails(
            type=PydanticCustomError("conflict", "{conflict}", {"conflict": conflict}),
            loc=conflict.at,
            input=None,
        )
        for conflict in conflicts
    ]
    raise ValidationError.from_exception_data("configuration", errors)


def explain(
    error: ValidationError, file: str, lines: Mapping[KeyPath, int], model: type[BaseModel]
) -> list[Problem]:
    """Translate what pydantic found.

    Args:
        error: The outcome of validating a document.
        file: The path to name.
        lines: Where the keys of the document stand, from `locate`.
        model: The model the document was validated against, for suggestions.

    """
    tables = _tables(model)
    return [
        Problem(file, _line(detail, lines), format_path(detail["loc"]), _message(detail, tables))
        for detail in error.errors(include_url=False)
    ]


def _line(detail: ErrorDetails, lines: Mapping[KeyPath, int]) -> int | None:
    """Return the line of the key, else of a key it conflicts with, else of the table around it."""
    conflict = detail.get("ctx", {}).get("conflict", Conflict(""))
    candidates = (detail["loc"], *conflict.because_of)
    known = (lines[path] for path in candidates if path in lines)
    return next(known, None) or nearest_line(lines, detail["loc"])


def _tables(model: type[BaseModel], name: str = "") -> dict[str, list[str]]:
    """Return the keys of each table of a file, those of the top level under the empty name."""
    tables = {name: list(model.model_fields)}
    for key, field in model.model_fields.items():
        inner: Any = next(iter(get_args(field.annotation)), field.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            tables |= _tables(inner, f"{name}.{key}" if name else key)
    return tables


def _message(detail: ErrorDetails, tables: Mapping[str, list[str]]) -> str:
    """Say what is wrong with one value."""
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key{_suggestion(detail['loc'], tables)}"
        case "value_error":
            return str(context["error"])
        case "conflict":
            return str(context["conflict"].message)
        case "literal_error":
            return _choose(re.findall("'([^']*)'", context["expected"]), detail["input"])
        case "missing":
            return "is missing; this key has no default"
        case kind:
            # Bounds of floats are floats, and nobody writes 1000000.0.
            plain = {name: f"{v:.0f}" if isinstance(v, float) else v for name, v in context.items()}
            key = format_path(detail["loc"])
            expected = _EXPECTED.get(kind, "another value").format(key=key, **plain)
            if kind == "tuple_type" and len(detail["loc"]) > 1:
                expected = "an array"
            return f"expected {expected}, found {shown(detail['input'])}"


def _choose(choices: list[str], found: object) -> str:
    """Name the choices, and the one that was probably meant."""
    words = [choice for choice in choices if not choice[0].isdecimal()]
    near = get_close_matches(found.lower(), words, n=1) if isinstance(found, str) else []
    hint = f" (did you mean {near[0]}?)" if near else ""
    if shown(found) in choices:
        hint = f"; write it in quotes, {shown(shown(found))}"
    return f"expected one of {', '.join(choices)}, found {shown(found)}{hint}"


def _suggestion(path: KeyPath, tables: Mapping[str, list[str]]) -> str:
    """Guess what an unknown key was meant to be: that of another table, or a similar one here."""
    *above, key = (step for step in path if isinstance(step, str))
    table = ".".join(above)
    elsewhere = [f"{name}.{key}" for name, keys in tables.items() if name and key in keys]
    meant = elsewhere or get_close_matches(key.lower(), tables.get(table, []), n=1)
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""
