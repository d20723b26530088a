"""`vlbridge train`: a bridge from a recipe."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import CommandError, exit_codes, one_line, print_line


@exit_codes()
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a shipped recipe (--list).")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a value, such as arguments.max_steps=100; may be repeated."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write to.", show_default="the recipe's name")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint in the output folder, if there is one.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run three steps on a few records, to check that everything works.")
    ] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="Show the shipped recipes and exit.")] = False,
) -> None:
    """Train a bridge from a recipe.

    On several devices: accelerate launch -m vlbridge.cli train ...
    """
    from vlbridge.training.training_recipes import RecipeError, read_recipe, shipped

    if list_recipes:
        names = shipped()
        width = max(map(len, names))
        for name in names:
            print_line(f"{name:{width}}  {read_recipe(name).description}", sys.stdout)
        return
    if recipe is None:
        raise CommandError("name a recipe: a YAML file, or one of those that --list shows", exit_code=2)
    try:
        chosen = read_recipe(recipe, settings or ())
    except RecipeError as error:
        raise CommandError(one_line(error), exit_code=2) from error
    if smoke:
        chosen = chosen.smoke_test()
    output = Path(Path(recipe).stem + ("-smoke" if smoke else "")) if output is None else output
    try:
        from vlbridge.training.training_failures import TrainingError
        from vlbridge.training.training_run import train as run
    except ModuleNotFoundError as error:
        raise CommandError(f"{error}; training needs more packages: pip install 'vlbridge[train]'") from error
    try:
        summary = run(chosen, output, resume=resume)
    except RecipeError as error:
        raise CommandError(one_line(error), exit_code=2) from error
    except (OSError, ValueError, TrainingError) as error:
        raise CommandError(one_line(error)) from error
    for row in summary["evaluation"]:
        print_line(f"{row['dataset']} ({row['split']}): {row['metric']} {row['value']:.4f}", sys.stdout)
    print_line(f"{output}: {summary['steps']} steps in {summary['seconds'] / 60:.1f} minutes", sys.stdout)


__all__ = ["train"]
