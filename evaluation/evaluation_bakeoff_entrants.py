"""Who takes part in a bake-off: recipes and trained bridges, and whether they can be compared."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..configuration.configuration_classification import ClassificationConfigMixin
from ..inference import bridged_config, model_source
from ..modeling.modeling_pins import frozen_parts_of
from ..training.training_recipes import DataRecipe, Recipe, read_recipe, shipped
from .evaluation_run import Options
from .evaluation_tasks import Task, TaskError


_PARTS = {"vision_model": "vision encoder", "language_model": "language model"}


class BakeoffError(ValueError):
    """What was given can't be compared, or not in this folder."""


@dataclass(frozen=True)
class Entrant:
    """A bridge that takes part.

    Args:
        name: In the table, and of its folder.
        source: Recipe, or the folder or Hub id of a trained model.
        stage: As in recipes.
        recipe: What to train; `None` for a trained model.
        parts: Where its frozen parts are from, by what they are, as far as that is known.
        training: Data and budget, by what they are; `None` for a trained model that has no recipe beside it.
    """

    name: str
    source: str
    stage: str
    recipe: Recipe | None
    parts: dict[str, str] = field(default_factory=dict)
    training: dict[str, object] | None = None


def read_entrant(given: str | os.PathLike, settings: Sequence[str] = ()) -> Entrant:
    """Read who takes part.

    Args:
        given: A recipe's file or name, or the folder or Hub id of a trained model; `NAME=` before it names it.
        settings: Changes to recipes, as for `read_recipe`.

    Raises:
        vlbridge.training.training_recipes.RecipeError: There is no such recipe, or something is wrong with it.
        BakeoffError: It can't take part.
    """
    name, source = _named(os.fspath(given))
    path = Path(source).expanduser()
    if source in shipped() or path.is_file() or not (path.is_dir() or "/" in source):
        recipe = read_recipe(source, settings)
        if recipe.lora is not None:
            raise BakeoffError(f"{source} trains an adapter (lora), which `evaluate` does not load: leave lora out.")
        if missing := recipe.missing_paths():
            raise BakeoffError(
                f"{source}: {', '.join(missing)} missing: say where the data is (--set {missing[0]}=FOLDER)."
            )
        parts = {} if recipe.from_ is None else _pinned(recipe.from_)
        parts |= _places({"vision encoder": recipe.vision, "language model": recipe.language})
        return Entrant(name, source, recipe.stage, recipe, parts, training_of(recipe))
    config = _config(source)
    stage = "classification" if isinstance(config, ClassificationConfigMixin) else "generative"
    if stage == "generative" and config.text_config is None:
        stage = "stage1"
    beside = path / "recipe.yaml"
    training = training_of(read_recipe(beside)) if beside.is_file() else None
    return Entrant(name, source, stage, None, _pinned(source), training)


def _named(given: str) -> tuple[str, str]:
    """The name of an entrant, and its source.

    Raises:
        BakeoffError: The name can't be that of a folder.
    """
    name, equals, source = given.partition("=")
    if not equals or Path(given).expanduser().exists():
        path = Path(given).expanduser()
        found = path.stem if path.suffix in (".yaml", ".yml") else path.resolve().name
        return re.sub(r"[^\w.-]+", "-", found), given
    if not re.fullmatch(r"\w[\w.-]*", name) or not source:
        raise BakeoffError(f"{given!r}: expected NAME=RECIPE, with a name of letters, digits, '.', '_' and '-'.")
    return name, source


def _config(source: str):
    try:
        return bridged_config(model_source(source))
    except (OSError, ValueError) as error:
        raise BakeoffError(f"{source!r} is neither a recipe nor a trained bridge: {error}") from error


def _pinned(source: str) -> dict[str, str]:
    """Where the parts of a saved model are from."""
    config = _config(source)
    pins = config.frozen_parts or {}
    return _places({_PARTS[part]: (pins.get(part) or {}).get("source") for part in frozen_parts_of(config)})


def _places(sources: dict[str, str | None]) -> dict[str, str]:
    return {key: _place(source) for key, source in sources.items() if source is not None}


def _place(source: str) -> str:
    """A folder's full path, as pins have it; Hub ids stay."""
    path = os.path.expanduser(source)
    return os.path.abspath(path) if os.path.exists(path) else source


def training_of(recipe: Recipe) -> dict[str, object]:
    """A recipe's data and budget, by what they are."""
    arguments, found = recipe.arguments, {}
    for number, data in enumerate(recipe.data):
        values = {key: getattr(data, key) for key in DataRecipe.__dataclass_fields__ if key != "name"}
        values["path"] = None if data.path is None else _place(data.path)
        found |= {f"data.{number}.{key}": value for key, value in values.items()}
    steps, epochs = arguments.get("max_steps", -1), arguments.get("num_train_epochs", 3)
    found["steps"] = steps if steps > 0 else f"{epochs} epochs"
    batch = arguments.get("per_device_train_batch_size", 8)
    return {**found, "records per step": batch * arguments.get("gradient_accumulation_steps", 1)}


def differences(entrants: Sequence[Entrant]) -> list[str]:
    """In what entrants differ that should be the same: parts, data and budget, as far as these are known."""
    first, *others = entrants
    found = []

    def compare(key: str, one: Entrant, value, other: Entrant, its_value) -> None:
        if value != its_value:
            found.append(f"{key} is {value!r} in {one.name} and {its_value!r} in {other.name}")

    for other in others:
        for key in [key for key in first.parts if key in other.parts]:
            compare(key, first, first.parts[key], other, other.parts[key])
    known = [entrant for entrant in entrants if entrant.training is not None]
    for other in known[1:]:
        for key in dict.fromkeys([*known[0].training, *other.training]):
            compare(key, known[0], known[0].training.get(key), other, other.training.get(key))
    return found


def check_entrants(entrants: Sequence[Entrant], task: Task, chosen: Options, allow_different: bool) -> list[str]:
    """Refuse entrants that can't be compared; gives their differences.

    Raises:
        BakeoffError: They can't.
        TaskError: One can't do the task.
    """
    names = [entrant.name for entrant in entrants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BakeoffError(f"two bridges are called {twice[0]!r}: name them, such as first={entrants[0].source}.")
    for entrant in entrants:
        expected = {"retrieval": ("stage1",), "class": ("classification", "generative")}.get(task.kind, ("generative",))
        if entrant.stage not in expected:
            raise TaskError(
                f"{entrant.name} is of stage {entrant.stage!r}; the task {task.name} is for {' or '.join(expected)}."
            )
        if chosen.blind and entrant.stage == "classification":
            raise TaskError(f"{entrant.name} is a classifier, which sees nothing but pictures: use grey, not blind.")
    found = differences(entrants)
    if found and not allow_different:
        raise BakeoffError(
            f"{'; '.join(found[:5])}{'; ...' if len(found) > 5 else ''}. A bake-off is about the same parts, data and "
            "budget; allow_different (--allow-different) compares these all the same, and says so."
        )
    return found


__all__ = ["BakeoffError", "Entrant", "check_entrants", "differences", "read_entrant", "training_of"]
