"""`vlbridge bakeoff`: several bridges on the same parts, data and budget."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import CommandError, DeviceOption, DtypeOption, exit_codes, one_line, print_line, quiet_libraries
from .cli_evaluate import (
    BlindOption,
    DemonstrationsOption,
    GreyOption,
    LimitOption,
    SamplesOption,
    ShotsOption,
    ShuffledOption,
    SplitOption,
)


@exit_codes()
def bakeoff(
    entrants: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...",
            help="Recipes (YAML file, or a name of `vlbridge train --list`) and trained bridges (folder or Hub id); "
            "NAME=RECIPE names one.",
            show_default=False,
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option("--task", "-t", help="As in `vlbridge evaluate`.", show_default="easy_vqa, if recipes name it"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="Folder with the task's own files.", show_default="easy-VQA is downloaded"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change all recipes, as in `vlbridge train`; may be repeated."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Number of trainings per recipe, or their seeds, such as 0,1,2.")] = "1",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to, or to continue in.")] = Path(
        "bakeoff"
    ),
    split: SplitOption = None,
    shots: ShotsOption = 0,
    demonstrations: DemonstrationsOption = "random",
    limit: LimitOption = None,
    blind: BlindOption = False,
    grey: GreyOption = False,
    shuffled: ShuffledOption = False,
    batch_size: SamplesOption = 8,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Also compare bridges with different parts, data or budgets.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print bakeoff.json instead of the table.")] = False,
) -> None:
    """Compare several bridges in one table.

    Recipes are trained on the same parts, data and budget; trained bridges are taken as they are.

    Writes a table, a picture and bakeoff.json. An interrupted command continues where it stopped. --device and --dtype
    apply to the evaluation; training follows the recipes.
    """
    options = {
        "split": split, "shots": shots, "demonstrations": demonstrations, "limit": limit, "blind": blind, "grey": grey,
        "shuffled": shuffled, "batch_size": batch_size, "device": device, "dtype": dtype,
    }  # fmt: skip
    quiet_libraries()
    try:
        from vlbridge.evaluation import evaluation_bakeoff as bakeoffs
        from vlbridge.evaluation.evaluation_bakeoff_report import notes, table
        from vlbridge.evaluation.evaluation_tasks import TaskError
        from vlbridge.training.training_recipes import RecipeError
    except ModuleNotFoundError as error:
        raise CommandError(f'{error}; a bake-off needs more packages: pip install "vlbridge[eval]"') from error
    try:
        report = bakeoffs.bakeoff(
            entrants, task, data, output, seeds, settings or (), allow_different, tell=_tell, **options
        )
    except (bakeoffs.BakeoffError, TaskError, RecipeError) as error:
        raise CommandError(one_line(error), exit_code=2) from error
    except (OSError, ValueError, ImportError, bakeoffs.JobError) as error:
        raise CommandError(one_line(error)) from error
    for line in [json.dumps(report, ensure_ascii=False)] if as_json else [*table(report), "", *notes(report)]:
        print_line(line, sys.stdout)
    print_line(f"{output}: bakeoff.md, bakeoff.png and bakeoff.json", sys.stderr)


def _tell(line: str) -> None:
    print_line(line, sys.stderr)


__all__ = ["bakeoff"]
