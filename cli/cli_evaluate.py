"""`vlbridge evaluate`: a model on a published benchmark."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import (
    CommandError,
    DeviceOption,
    DtypeOption,
    device_and_dtype,
    exit_codes,
    explaining_out_of_memory,
    loading,
    one_line,
    print_line,
    quiet_libraries,
)


ModelArgument = Annotated[
    str | None, typer.Argument(help="Model to evaluate: a folder or Hub id.", show_default="the embedded bridge")
]
TaskOption = Annotated[
    str | None, typer.Option("--task", "-t", help="Name of a task (--list), or a YAML file of the same form.")
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", "-d", help="Folder with the benchmark's files.", show_default="easy_vqa fetches its own"),
]
SplitOption = Annotated[str | None, typer.Option(help="Split to evaluate.", show_default="the task's")]
ShotsOption = Annotated[int, typer.Option(min=0, help="Number of examples shown in the prompt before each question.")]
DemonstrationsOption = Annotated[
    str,
    typer.Option(
        help="Which examples: random, the same for all questions; or rices, those with the most similar pictures."
    ),
]
TextOnlyOption = Annotated[bool, typer.Option("--text-only", help="Show the examples without their pictures.")]
ShownSplitOption = Annotated[
    str | None, typer.Option(help="Split that the examples are taken from.", show_default="the task's")
]
ShownDataOption = Annotated[
    Path | None, typer.Option(help="Folder of that split's files.", show_default="that of --data")
]
SeedOption = Annotated[int, typer.Option(help="Random seed.")]
BlindOption = Annotated[bool, typer.Option("--blind", help="Also ask without pictures.")]
GreyOption = Annotated[bool, typer.Option("--grey", help="Also ask with a grey picture.")]
ShuffledOption = Annotated[bool, typer.Option("--shuffled", help="Also ask with other samples' pictures.")]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Use only this many samples, drawn at random.", show_default="all of them")
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Folder to write to, or to continue in.", show_default="results/MODEL/TASK-SPLIT"
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(help="Prompt, in which {question}, {context} and {choices} are filled in.", show_default="the task's"),
]
FormOption = Annotated[
    str | None,
    typer.Option(
        help="Form of the prompt: few_shot (the family's own) or chat (a conversation).", show_default="the task's"
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        help="generate: write an answer; rank: take the likeliest of the given answers.", show_default="the task's"
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An argument of generate, such as num_beams=5; may be repeated."),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Retrieval: number of candidates that are ranked again by matching (ITM).",
        show_default="the task's",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option(
        help="Name of the data in the results and the model card.", show_default="the benchmark's or folder's name"
    ),
]
CardOption = Annotated[
    bool, typer.Option("--card", help="Also write the figures into the model card in the model's folder.")
]
SamplesOption = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Samples per batch.")]
TableOption = Annotated[bool, typer.Option("--json", help="Print results.json instead of a table.")]
ListOption = Annotated[bool, typer.Option("--list", help="Show the tasks and their files, and exit.")]


def _settings(settings: list[str] | None) -> dict:
    """Arguments of `generate` from KEY=VALUE.

    Raises:
        CommandError: One is not of this form.
    """
    import yaml

    options = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise CommandError(f"--set {setting}: expected KEY=VALUE", exit_code=2)
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise CommandError(f"--set {setting}: {one_line(error)}", exit_code=2) from error
    return options


def _modules():
    """The modules that do the work.

    Raises:
        CommandError: A package is missing.
    """
    try:
        from vlbridge.evaluation import evaluation_run, evaluation_tasks
    except ModuleNotFoundError as error:
        raise CommandError(f'{error}; evaluation needs more packages: pip install "vlbridge[eval]"') from error
    return evaluation_run, evaluation_tasks


def _print_tasks() -> None:
    _, tasks = _modules()
    names = tasks.task_names()
    width = max(map(len, names))
    for name in names:
        task = tasks.load_task(name)
        print_line(f"{name:{width}}  {task.title}; {task.layout}", sys.stdout)


@exit_codes()
def evaluate(
    model: ModelArgument = None,
    task: TaskOption = None,
    data: DataOption = None,
    split: SplitOption = None,
    shots: ShotsOption = 0,
    demonstrations: DemonstrationsOption = "random",
    text_only: TextOnlyOption = False,
    demonstration_split: ShownSplitOption = None,
    demonstration_data: ShownDataOption = None,
    seed: SeedOption = 0,
    blind: BlindOption = False,
    grey: GreyOption = False,
    shuffled: ShuffledOption = False,
    limit: LimitOption = None,
    output: OutputOption = None,
    prompt: PromptOption = None,
    form: FormOption = None,
    method: MethodOption = None,
    settings: SetOption = None,
    top_k: TopKOption = None,
    dataset_name: NameOption = None,
    card: CardOption = False,
    batch_size: SamplesOption = 8,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: TableOption = False,
    list_tasks: ListOption = False,
) -> None:
    """Evaluate a model on a benchmark.

    Prints figures with confidence intervals, and writes them and all predictions to a folder. --blind, --grey and
    --shuffled add baselines: what the model scores without looking.

    An interrupted run continues where it stopped. Several processes share the samples: accelerate launch (on CPUs
    torchrun) -m vlbridge.cli evaluate ...
    """
    if list_tasks:
        _print_tasks()
        return
    if task is None:
        raise CommandError("name a task: --task, one of those that --list shows", exit_code=2)
    device_and_dtype(device, dtype)
    options = {
        "split": split, "shots": shots, "demonstrations": demonstrations, "text_only": text_only,
        "demonstration_split": demonstration_split, "demonstration_data": demonstration_data, "seed": seed,
        "blind": blind, "grey": grey, "shuffled": shuffled, "limit": limit, "batch_size": batch_size, "prompt": prompt,
        "form": form, "method": method, "generation": _settings(settings), "top_k": top_k,
        "dataset_name": dataset_name, "device": device, "dtype": dtype,
    }  # fmt: skip
    _evaluate(model, task, data, output, options, card, as_json)


def _evaluate(
    model: str | None, name: str, data: Path | None, output: Path | None, options: dict, card: bool, as_json: bool
) -> None:
    """Evaluate, print the result, and write it into the model's card if that is wanted.

    Raises:
        CommandError: Something is wrong with the command line, the model or the data.
    """
    run, tasks = _modules()
    from vlbridge.inference import model_source
    from vlbridge.training.training_failures import TrainingError

    quiet_libraries()
    _quiet_datasets()
    source = model_source(model)
    if card and not Path(source).is_dir():
        raise CommandError(f"--card needs a model in a folder; {source!r} is none", exit_code=2)
    try:
        task = tasks.load_task(name)
        with loading(source):
            pass  # there is such a model
        folder = output or _default_output(source, task, options)
        with explaining_out_of_memory(options["batch_size"]):
            result = run.evaluate(source, None, task, data, folder, **options)
    except tasks.TaskError as error:
        raise CommandError(one_line(error), exit_code=2) from error
    except (OSError, ValueError, ImportError, TrainingError) as error:
        raise CommandError(one_line(error)) from error
    if run.Processes().is_main:
        _report(result, folder, source if card else None, as_json)


def _quiet_datasets() -> None:
    import datasets

    datasets.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _default_output(source: str, task, options: dict) -> Path:
    """The folder to write to if none is given: its name says what is evaluated."""
    parts = [task.name, options["split"] or task.split]
    text_only = "-text-only" if options["text_only"] else ""
    parts += [f"{options['shots']}-shots-{options['demonstrations']}{text_only}"] if options["shots"] else []
    parts += [f"{options['limit']}-samples"] if options["limit"] is not None else []
    parts += [f"seed-{options['seed']}"] if options["seed"] else []
    return Path("results") / Path(source).name / "-".join(parts)


def _report(result: dict, folder: Path, model: str | None, as_json: bool) -> None:
    """Print a result, and write it into the card of the model in a folder.

    Raises:
        CommandError: The card can't be written.
    """
    from vlbridge.evaluation.evaluation_scores import eval_results, table_lines

    for line in [json.dumps(result, ensure_ascii=False)] if as_json else table_lines(result):
        print_line(line, sys.stdout)
    print_line(f"{folder}: results.json and predictions", sys.stderr)
    if model is None:
        return
    from vlbridge.cards_results import add_results

    try:
        path = add_results(model, eval_results(result))
    except (OSError, ValueError) as error:
        raise CommandError(one_line(error)) from error
    print_line(f"{path}: figures of {result['dataset']} ({result['split_name']})", sys.stderr)


__all__ = ["evaluate"]
