"""Arguments of `TrainingArguments` in a recipe: names, types and ranges, checked before any data is read."""

from __future__ import annotations

import enum
import types
import typing

from transformers import TrainingArguments

from ..compat import training_argument


# Smallest values. What is bounded above is below 1.
AT_LEAST_1 = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
AT_LEAST_0 = (
    "learning_rate", "weight_decay", "warmup_steps", "adam_epsilon", "max_grad_norm", "dataloader_num_workers", "seed",
    "data_seed",
)  # fmt: skip
ABOVE_0 = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "save_total_limit")
BELOW_1 = ("adam_beta1", "adam_beta2", "label_smoothing_factor")


def problem_of(name: str, value: typing.Any) -> str | None:
    """What is wrong with the value of an argument, as far as its type and range tell.

    Args:
        name: Name of the argument, which `TrainingArguments` has.
        value: Its value, as YAML gives it.

    Returns:
        "expected ...", or `None` if nothing is wrong.
    """
    allowed = _alternatives(typing.get_type_hints(TrainingArguments).get(training_argument(name)))
    if allowed and not any(_fits(value, hint) for hint in allowed):
        return f"expected {_in_words(allowed)}"
    return _out_of_range(training_argument(name), value)


def _alternatives(hint) -> tuple:
    """The types that an annotation allows; nothing if some of them can't be told from a value."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    allowed = typing.get_args(hint) if union else (hint,)
    if any(isinstance(each, type) and issubclass(each, enum.Enum) for each in allowed):  # beside `str`, which says less
        allowed = tuple(each for each in allowed if each is not str)
    elif str in allowed:  # which may be a shorthand: fsdp takes true, though it is annotated as text
        return ()
    plain = all(isinstance(typing.get_origin(each) or each, type) for each in allowed)
    return allowed if plain else ()


def _fits(value, hint) -> bool:
    origin = typing.get_origin(hint) or hint
    if issubclass(origin, enum.Enum):
        return value in {member.value for member in origin}
    if origin is float:
        return type(value) in (int, float)
    return type(value) is origin


def _in_words(allowed: tuple) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "keys and values"}
    words |= {list: "a list", type(None): "null"}
    found: list[str] = []
    for hint in allowed:
        origin = typing.get_origin(hint) or hint
        if issubclass(origin, enum.Enum):
            found += ["one of " + ", ".join(str(member.value) for member in origin)]
        else:
            found += [words.get(origin, origin.__name__)]
    return " or ".join(dict.fromkeys(found))


def _out_of_range(name: str, value) -> str | None:
    if type(value) not in (int, float):
        return None
    if name == "max_steps" and value != -1 and value < 1:
        return "expected at least 1, or -1 for whole epochs"
    if name in AT_LEAST_1 and value < 1:
        return "expected at least 1"
    if name in (*AT_LEAST_0, *BELOW_1) and value < 0:
        return "expected at least 0"
    if name in ABOVE_0 and value <= 0:
        return "expected more than 0"
    if name in BELOW_1 and value >= 1:
        return "expected less than 1"
    return None


__all__ = ["problem_of"]
