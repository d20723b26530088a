"""`vlbridge train`: a bridge from a recipe; and `vlbridge new-recipe`: a recipe for data of one's own."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import CommandError, JsonOption, exit_codes, one_line, print_line
from .cli_data import SetOption, reading_data, source_options


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
    as_json: JsonOption = False,
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
            about = {"recipe": name, "description": read_recipe(name).description}
            line = json.dumps(about) if as_json else f"{name:{width}}  {about['description']}"
            print_line(line, sys.stdout)
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
    except KeyboardInterrupt:
        left = any(output.glob("checkpoint-*"))
        raise KeyboardInterrupt(f"{output} goes on with --resume" if left else "") from None
    if as_json:
        print_line(json.dumps({"output": str(output), **summary}), sys.stdout)
        return
    for row in summary["evaluation"]:
        print_line(f"{row['dataset']} ({row['split']}): {row['metric']} {row['value']:.4f}", sys.stdout)
    print_line(f"{output}: {summary['steps']} steps in {summary['seconds'] / 60:.1f} minutes", sys.stdout)


# ---------------------------------------------------------------------- recipes for data of one's own


@exit_codes()
def new_recipe(
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="Folder of pictures, or file of records.", show_default="asked for"),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="What to train on: captions, questions, classes, interleaved.", show_default="what there is"),
    ] = None,
    bridge: Annotated[
        str | None, typer.Option(help="mlp, qformer or perceiver.", show_default="one that suits the kind")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of the bridge: small, medium, large.", show_default="fits the data")
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="Vision encoder: folder or Hub id.", show_default="the embedded one")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Language model: folder or Hub id.", show_default="the embedded one")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="What to train on: cpu or cuda.", show_default="this machine's")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="Memory of the GPU, in GB.", show_default="this machine's")
    ] = None,
    settings: SetOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write.", show_default="DATA's name with .yaml")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a recipe for pictures of your own, with a bridge and batches that fit the data and the device.

    Without DATA, it asks on a terminal.
    """
    asks = data is None and on_terminal()
    if data is None and not asks:
        raise CommandError("name your data: vlbridge new-recipe FOLDER", exit_code=2)
    if asks:
        data = typer.prompt("Folder of pictures, or file of records", err=True)
    output = Path(f"{Path(data).resolve().name.split('.')[0] or 'recipe'}.yaml") if output is None else output
    if output.exists() and not force:
        raise CommandError(f"{output} exists: give another --output, or --force to replace it", exit_code=2)
    options = source_options(settings)
    with reading_data(data):
        from vlbridge.families import FAMILIES
        from vlbridge.files import write_text
        from vlbridge.training import training_new_recipe as recipes

        choices = {"--kind": (kind, recipes.KINDS), "--bridge": (bridge, FAMILIES), "--size": (size, recipes.SIZES),
                   "--device": (device, ("cpu", "cuda"))}  # fmt: skip
        for flag, (value, known) in choices.items():
            if value is not None and value not in known:
                raise CommandError(f"{flag} is {value!r}; expected one of {', '.join(known)}", exit_code=2)
        try:
            found = recipes.look_at(data, kind, options)
        except recipes.SeveralKinds as several:
            if not (on_terminal() and several.kinds):
                raise
            found = recipes.look_at(data, _asked("What to train on", several.kinds, several.kinds[0]), options)
        if asks:
            bridge = bridge or _asked("Bridge", FAMILIES, recipes.default_bridge(found.kind))
            size = size or _asked("Size of the bridge", recipes.SIZES, recipes.size_for(found.records))
            vision = vision or typer.prompt("Vision encoder", recipes.VISION, err=True)
            if found.kind != "classes":
                language = language or typer.prompt("Language model", recipes.LANGUAGE, err=True)
            device = device or _asked("Train on", ("cpu", "cuda"), recipes.Device.here(None, memory).name)
        parts = {name: part for name, part in (("vision", vision), ("language", language)) if part is not None}
        text = recipes.new_recipe(found, bridge, size, device=recipes.Device.here(device, memory), **parts)
        write_text(output, text)
    about = {"recipe": str(output), "kind": found.kind, "records": found.records, "held_out": found.held_out}
    if as_json:
        print_line(json.dumps(about), sys.stdout)
        return
    print_line(f"{output}: {found.records:,} {found.kind} to train on, {found.held_out:,} to evaluate on", sys.stdout)
    print_line(f"next: vlbridge train {output} --smoke", sys.stdout)


def on_terminal() -> bool:
    """Whether someone can be asked."""
    return sys.stdin.isatty()


def _asked(question: str, choices, default: str) -> str:
    """The answer of someone on a terminal, which is one of some choices."""
    while True:
        answer = typer.prompt(f"{question} ({', '.join(choices)})", default, err=True)
        if answer in choices:
            return answer
        print_line(f"{answer!r} is none of {', '.join(choices)}", sys.stderr)


__all__ = ["new_recipe", "train"]
