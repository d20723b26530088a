"""Values of recipes: dataclasses from the mappings of a YAML file and back, with errors that say where."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing


class RecipeError(ValueError):
    """Something is wrong with a recipe: what, and where in the file."""


def listed(names) -> str:
    """Names as words: `a, b and c`."""
    names = list(names)
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def one_of(key: str, value, expected: tuple) -> None:
    """Refuse a value that is not among those expected.

    Args:
        key: Where it stands.
        value: The value.
        expected: Those that are allowed.

    Raises:
        RecipeError: It is none of them.
    """
    if value not in expected:
        raise RecipeError(f"{key} is {value!r}; expected one of {', '.join(map(repr, expected))}.")


def unknown(name: str, known, where: str) -> str:
    """What is wrong with a key that does not exist.

    Args:
        name: The key.
        known: Those that exist.
        where: What it was a key of; empty for the recipe itself.
    """
    near = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0.5)
    meant = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}."
    return f"{where or 'a recipe'} has no key {name!r}; {meant}"


def build(cls, fields, where: str):
    """A dataclass from a mapping.

    Args:
        cls: The dataclass.
        fields: The mapping, as YAML gives it.
        where: Where it stands in the recipe; empty for the recipe itself.

    Raises:
        RecipeError: An unknown or missing key, or a value of the wrong kind.
    """
    if not isinstance(fields, dict):
        raise RecipeError(f"{where} is {fields!r}; expected keys and values.")
    hints = typing.get_type_hints(cls)
    known = {name.removesuffix("_") for name in hints}
    values = {}
    for name, value in fields.items():
        if name not in hints:
            raise RecipeError(unknown(name, known, where))
        values[name] = _converted(value, hints[name], f"{where}.{name}".strip(".").removesuffix("_"))
    for f in dataclasses.fields(cls):
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in values:
            raise RecipeError(f"{where}.{f.name} is missing.")
    return cls(**values)


def _converted(value, hint, where: str):
    """A value as its annotation wants it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in arguments:
        if value is None:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, {} if value is None else value, where)
    if origin is list:
        value = [] if value is None else value
        if not isinstance(value, list):
            raise RecipeError(f"{where} is {value!r}; expected a list.")
        return [_converted(item, arguments[0], f"{where}.{number}") for number, item in enumerate(value)]
    if (origin or hint) is dict:
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise RecipeError(f"{where} is {value!r}; expected keys and values.")
        return {key: _converted(v, arguments[1], f"{where}.{key}") if arguments else v for key, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise RecipeError(
            f"{where} is {value!r}; expected {'text' if hint is str else f'a value of type {hint.__name__}'}."
        )
    return value


def without_defaults(value):
    """A dataclass as a mapping of the fields that differ from their defaults; lists are taken apart, the rest copied.

    Args:
        value: A dataclass, or what a field of one holds.
    """
    if isinstance(value, list):
        return [without_defaults(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return copy.deepcopy(value)
    found = {}
    for f in dataclasses.fields(value):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if getattr(value, f.name) != default:
            found[f.name] = without_defaults(getattr(value, f.name))
    return found


__all__ = ["RecipeError", "build", "listed", "one_of", "unknown", "without_defaults"]
