"""`vlbridge data check` and `data show`, which inspect training data, and `vlbridge capfilt`, which cleans captions."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import (
    BatchSizeOption,
    CommandError,
    DeviceOption,
    DtypeOption,
    ShardOption,
    device_and_dtype,
    exit_codes,
    explaining_out_of_memory,
    loading,
    one_line,
    print_line,
    quiet_libraries,
    share_of,
)


# ---------------------------------------------------------------------- captions


@exit_codes()
def capfilt(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Images with captions: JSON, JSON Lines, CSV, TSV, COCO annotations, or a folder with metadata.jsonl.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to, or to resume in.")],
    captioner: Annotated[
        str | None, typer.Option(help="Bridged model, stage 1 of BLIP-2, or BLIP: a folder or Hub id.")
    ] = None,
    matcher: Annotated[
        str | None,
        typer.Option("--filter", help="Stage 1 of BLIP-2, or BLIP's image-text matcher: a folder or Hub id."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that image paths are relative to.", show_default="that of DATA")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Keep captions that match with at least this probability.")
    ] = 0.5,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What captions begin with.", show_default="the captioner's own")
    ] = None,
    num_captions: Annotated[
        int | None, typer.Option(min=0, help="Captions to generate per image; 0 only filters.", show_default="1")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length of a caption, in tokens.", show_default="30")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Probability mass for nucleus sampling.", show_default="0.9")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed for the captions.", show_default="0")] = None,
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    shard: ShardOption = None,
) -> None:
    """Clean the captions of images (CapFilt).

    Generates new captions, scores old and new ones by how well they match their image, and keeps those that match.

    An interrupted run resumes where it stopped. Scores are cached: changing --threshold does not rerun the models.
    """
    chosen_device, default_dtype = device_and_dtype(device, dtype)
    part = share_of(shard)
    quiet_libraries()
    from vlbridge.training import training_capfilt

    given = {
        "captioner": captioner, "filter": matcher, "prompt": prompt, "num_captions": num_captions,
        "max_new_tokens": max_new_tokens, "top_p": top_p, "seed": seed, "dtype": dtype,
    }  # fmt: skip
    try:
        settings = training_capfilt.settings_for(output, default_dtype, **given)
        samples = training_capfilt.read_samples(data, images)
        with explaining_out_of_memory(batch_size):
            summary = training_capfilt.capfilt(
                samples, output, settings, threshold=threshold, batch_size=batch_size, device=chosen_device,
                load=_load_capfilt_models, shard=part,
            )  # fmt: skip
    except (OSError, ValueError, FloatingPointError) as error:
        raise CommandError(one_line(error)) from error
    if "left" in summary:
        print_line(f"{summary['left']:,} of {summary['images']:,} images are left to other shards", sys.stdout)
        return
    for image, reason in summary["failed"].items():
        print_line(f"vlbridge: error: {image}: {reason}", sys.stderr)
    for source in ("web", "synthetic"):
        counts = summary[source]
        print_line(f"{source}: {counts['kept']:,} of {counts['captions']:,} captions kept", sys.stdout)
    if summary["failed"]:
        raise CommandError(f"{len(summary['failed'])} of {summary['images']} images could not be read")


def _load_capfilt_models(settings, device):
    """Load the captioner, if one is needed, and the filter.

    Raises:
        CommandError: One of them can't be loaded.
    """
    from vlbridge.training import training_capfilt_models as models

    captioner = None
    if settings.num_captions:
        with loading(settings.captioner):
            captioner = models.load_captioner(settings.captioner, settings.prompt, settings.dtype, device)
    with loading(settings.filter):
        return captioner, models.load_matcher(settings.filter, settings.dtype, device)


# ---------------------------------------------------------------------- data sets


data_commands = typer.Typer(
    name="data", help="Inspect data before training on it.", no_args_is_help=True, rich_markup_mode=None
)

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Layout of the data: llava, coco_captions, vqav2, imagefolder, webdataset, interleaved, easy_vqa, hub.",
    ),
]
DataPathArgument = Annotated[
    str | None,
    typer.Argument(metavar="PATH", help="File, folder or quoted glob.", show_default="easy_vqa fetches its own"),
]
SplitOption = Annotated[str | None, typer.Option(help="Split of the data set, such as train or val2014.")]
StreamingOption = Annotated[
    bool, typer.Option("--streaming", help="Stream the records, without a copy in the cache of datasets.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of the source, such as images=FOLDER; may be repeated."),
]


@contextmanager
def reading_data(source: str) -> Iterator[None]:
    """Turn errors in the data into an error of one line.

    Raises:
        CommandError: The data can't be read, or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise CommandError('reading training data needs datasets: pip install "vlbridge[train]"') from error
    quiet_libraries()
    datasets.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CommandError(f"{source}: {one_line(error)}") from error


def source_options(settings: list[str] | None) -> dict:
    """Options of a source from `--set KEY=VALUE`, with values in YAML.

    Raises:
        CommandError: One is not of this form.
    """
    import yaml

    options = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise CommandError(f"--set {setting}: expected KEY=VALUE", exit_code=2)
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise CommandError(f"--set {setting}: {one_line(error)}", exit_code=2) from error
    return options


def _load_records(source: str, path: str | None, split: str | None, streaming: bool, settings: list[str] | None):
    """The data set that the command line names.

    Raises:
        CommandError: There is no such source, or an option is not of the form KEY=VALUE.
    """
    from vlbridge.training.training_data import SOURCES, load

    if source not in SOURCES:
        raise CommandError(f"SOURCE is {source!r}; expected one of {', '.join(SOURCES)}", exit_code=2)
    return load(source, path, split=split, streaming=streaming, **source_options(settings))


def _sheet_format(sheet: Path) -> str:
    """Pillow's name of the format that a contact sheet is written in.

    Raises:
        CommandError: Pillow writes no files with this ending.
    """
    from PIL import Image

    image_format = Image.registered_extensions().get(sheet.suffix.lower())
    if image_format not in Image.SAVE:
        raise CommandError(f"--sheet {sheet}: expected a picture's name, such as sheet.png", exit_code=2)
    return image_format


def _token_counting(model: str, max_length: int | None):
    """What is needed to count tokens as a model does.

    Returns:
        Its processor; and the longest record that fits, in tokens, `None` if there is no limit.

    Raises:
        CommandError: There is no such model, or it has no language model.
    """
    from transformers import AutoProcessor

    from vlbridge.inference import bridged_config, model_source

    source = model_source(model)
    with loading(source):
        text_config = bridged_config(source, generates=True).text_config.get_text_config()
        processor = AutoProcessor.from_pretrained(source)
    return processor, max_length or getattr(text_config, "max_position_embeddings", None)


@data_commands.command("check")
@exit_codes()
def check(
    source: SourceArgument,
    path: DataPathArgument = None,
    split: SplitOption = None,
    streaming: StreamingOption = False,
    settings: SetOption = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Check only this many records.", show_default="all of them")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for the sample and for the records on the sheet.")] = 0,
    sheet: Annotated[
        Path | None, typer.Option(help="Image file to write: a contact sheet of some records with their texts.")
    ] = None,
    cells: Annotated[int, typer.Option(min=1, help="Number of records on the sheet.")] = 24,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Count tokens as this model does: a folder or Hub id.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum length of a record, in tokens.", show_default="the model's context window"),
    ] = None,
    max_broken: Annotated[
        float, typer.Option(min=0, help="Largest share (below 1) or number of records that may be broken.")
    ] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check whether data is fit for training.

    Opens every image and reads every text. The exit code is 1 if the data is not fit.
    """
    sheet_format = None if sheet is None else _sheet_format(sheet)
    processor = None
    with reading_data(source):
        records = _load_records(source, path, split, streaming, settings)
    if model is not None:
        processor, max_length = _token_counting(model, max_length)
    with reading_data(source):
        from vlbridge.files import replacing
        from vlbridge.training.training_data_check import check_data, contact_sheet

        report, shown = check_data(
            records, sample=sample, seed=seed, max_broken=max_broken, processor=processor, window=max_length,
            num_cells=0 if sheet is None else cells, progress=sys.stderr.isatty(),
        )  # fmt: skip
        if sheet is not None and shown:
            with replacing(sheet) as temporary:
                contact_sheet(shown).save(temporary, format=sheet_format)
    for line in [json.dumps(report.as_dict())] if as_json else report.lines():
        print_line(line, sys.stdout)
    if not report.ok:
        raise typer.Exit(1)


@data_commands.command("show")
@exit_codes()
def show(
    source: SourceArgument,
    path: DataPathArgument = None,
    split: SplitOption = None,
    streaming: StreamingOption = False,
    settings: SetOption = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="Number of records to print.")] = 3,
    skip: Annotated[int, typer.Option(min=0, help="Number of records to skip first.")] = 0,
) -> None:
    """Print records as training sees them.

    Each line is a JSON object.
    """
    from vlbridge.compat import take

    with reading_data(source):
        records = _load_records(source, path, split, streaming, settings)
        for record in take(records.skip(skip), number):
            for image in record["images"]:
                if image["bytes"] is not None:
                    image["bytes"] = f"{len(image['bytes']):,} bytes"
            print_line(json.dumps(record, ensure_ascii=False), sys.stdout)


__all__ = ["SetOption", "capfilt", "data_commands", "reading_data", "source_options"]
