"""The command line: `vlbridge caption`, `ask`, `info`, `capfilt`, `data`, `convert`, `export`, `transplant`, `list` and `push`.

Exit codes: 0, all went well; 1, something failed (a model, a device, some of the images); 2, the command line is wrong;
130, interrupted. Results go to stdout, everything else to stderr.
"""

# torch, transformers, PIL and tqdm are imported where they are used: --help and --version need none of them.
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from textwrap import shorten
from typing import Annotated

import typer
import typer.core


DTYPES = ("auto", "float32", "bfloat16", "float16")

app = typer.Typer(
    name="vlbridge",
    help="Caption images, ask about them, and look into bridges between vision encoders and language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, or id on the Hub.", show_default="the embedded bridge")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps...", show_default="cuda, else mps, else cpu")
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help=f"One of {', '.join(DTYPES)}.", show_default="float32 on cpu, else bfloat16"),
]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images at a time.")]
RecursiveOption = Annotated[bool, typer.Option("--recursive", "-r", help="Look into subfolders too.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]


class CommandError(Exception):
    """An error that ends the command with one line on stderr.

    Args:
        message: What is wrong; line breaks become spaces.
        exit_code: 1, or 2 where the command line itself is wrong.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


@contextmanager
def _exit_codes():
    """Turn errors into exit codes, without tracebacks; bugs keep theirs."""
    try:
        yield
    except CommandError as error:
        _print(f"vlbridge: error: {error}", sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as interruption:
        if str(interruption):
            _print(f"vlbridge: interrupted: {interruption}", sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader (`| head`) has had enough
        with suppress(OSError):  # or Python would complain when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


def _print(line: str, file) -> None:
    """Write a line at once, past any progress bar, whatever characters the terminal knows."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=file) if sys.stderr.isatty() else nullcontext():
        try:
            file.write(f"{line}\n")
        except UnicodeEncodeError:
            encoding = file.encoding or "ascii"
            file.write(line.encode(encoding, errors="backslashreplace").decode(encoding) + "\n")
        file.flush()


# ---------------------------------------------------------------------- model


def _device_and_dtype(device: str | None, dtype: str | None):
    """Check what the command line says, and fill in what it does not.

    Returns:
        The `torch.device`, and the name of the dtype.

    Raises:
        CommandError: There is no such device or dtype, or this machine lacks the device.
    """
    if dtype is not None and dtype not in DTYPES:
        raise CommandError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}", exit_code=2)
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise CommandError(f"--device is {device!r}; expected cpu, cuda, cuda:<number>, mps...", 2) from error
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device {device}: {_one_line(error)}") from error
    return chosen, dtype or ("float32" if chosen.type == "cpu" else "bfloat16")


def _one_line(error: BaseException) -> str:
    return shorten(str(error), 1500, placeholder=" ...") or type(error).__name__


@contextmanager
def _loading(model: str):
    """Name the model in whatever goes wrong while it is being loaded."""
    path = Path(model)
    try:
        if path.is_file():
            raise CommandError("it is a file; give the folder that holds config.json")
        if not path.is_dir():
            if model.startswith((".", "/")) or model.count("/") > 1:
                raise CommandError("no such folder")
            _look_up(model)
        yield
    except Exception as error:
        raise CommandError(f"cannot load {model!r}: {_one_line(error)}") from error


def _look_up(model: str) -> None:
    """Refuse what is not on the Hub, with one question: from_pretrained asks for minutes when it gets no answer.

    Raises:
        CommandError: There is no such model on the Hub, or the Hub does not answer, and the model is not in the cache.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    neither = "it is not a folder here, and"
    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return
        HfApi().model_info(model, timeout=10)
    except HFValidationError as error:
        raise CommandError(f"{neither} not a name that the Hub allows") from error
    except RepositoryNotFoundError as error:
        raise CommandError(f"{neither} the Hub has no such model, or it is private") from error
    except Exception as error:  # which ones depends on the HTTP client of this version of huggingface_hub
        raise CommandError(f"{neither} the Hub cannot be asked: {_one_line(error)}") from error


def _bridged_config(model: str):
    """Configuration of a bridged model.

    Raises:
        CommandError: The model is none.
    """
    from transformers import AutoConfig  # importing this package has registered the families

    from .configuration import BridgedConfig

    config = AutoConfig.from_pretrained(model)
    if not isinstance(config, BridgedConfig):
        raise CommandError(f"it is a {config.model_type!r} model, not a bridged one")
    return config


def _quiet_libraries() -> None:
    """Keep the libraries' chatter off stderr; a terminal still gets their progress bars."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load(model: str | None = None, device: str | None = None, dtype: str | None = None):
    """Load a bridged model and its processor.

    Args:
        model: Folder, or id on the Hub; `None` takes the embedded bridge.
        device: Where to put it; `None` takes cuda, else mps, else cpu.
        dtype: One of `DTYPES`; `None` takes float32 on the cpu and bfloat16 elsewhere.

    Returns:
        The model, in eval mode, and the processor.

    Raises:
        CommandError: There is no such model, device or dtype.
    """
    device, dtype = _device_and_dtype(device, dtype)
    from transformers import AutoModel, AutoProcessor

    from . import default_model

    model = default_model() if model is None else os.path.expanduser(model)
    with _loading(model):
        _bridged_config(model)
        processor = AutoProcessor.from_pretrained(model)
        loaded = AutoModel.from_pretrained(model, dtype=dtype)
        return loaded.to(device).eval(), processor


# ---------------------------------------------------------------------- answers


def answer(
    model, processor, images: Sequence, prompt: str, *, max_new_tokens: int = 40, batch_size: int = 8, **options
) -> list[str]:
    """Ask the same thing about every image, greedily unless `options` say otherwise.

    Args:
        model: A bridged model.
        processor: Its processor.
        images: RGB images.
        prompt: What to ask; `processor.caption_prompt` asks for a caption.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Images that the model sees at a time.
        options: Further ones of `generate`.

    Returns:
        One text per image.
    """
    texts = []
    for start in range(0, len(images), batch_size):
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
            for image in images[start : start + batch_size]
        ]
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device)
        options = {"do_sample": False, **options}
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        if not model.config.is_encoder_decoder:
            generated = generated[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(generated, skip_special_tokens=True)]
    return texts


def _answer_files(
    files: Sequence[Path], load_model, prompt: str | None, max_new_tokens: int, batch_size: int
) -> Iterator[tuple[Path, str | None, str | None]]:
    """Answer about image files, batch by batch.

    Args:
        files: The image files.
        load_model: Gives the model and the processor; called once, when the first image could be read.
        prompt: What to ask; `None` takes the processor's `caption_prompt`.

    Yields:
        The file, and its text or what is wrong with it.
    """
    from .images import ImageError, load_image

    model = processor = None
    for start in range(0, len(files), batch_size):
        images, errors = {}, {}
        batch = files[start : start + batch_size]
        for file in batch:
            try:
                images[file] = load_image(file)
            except ImageError as error:
                errors[file] = error.reason
        texts = {}
        if images:
            if model is None:
                model, processor = load_model()
                prompt = processor.caption_prompt if prompt is None else prompt
            texts, refused = _answer_batch(model, processor, images, prompt, max_new_tokens)
            errors |= refused
        for file in batch:
            yield file, texts.get(file), errors.get(file)


def _answer_batch(model, processor, images: dict, prompt: str, max_new_tokens: int) -> tuple[dict, dict]:
    """Answer about the images of one batch; one by one if it is refused, so that one image does not lose the others.

    Returns:
        Texts, and reasons for having none, by file.
    """
    try:
        texts = answer(
            model, processor, list(images.values()), prompt, max_new_tokens=max_new_tokens, batch_size=len(images)
        )
        return dict(zip(images, texts, strict=True)), {}
    except ValueError as error:
        if len(images) == 1:
            return {}, {next(iter(images)): _one_line(error)}
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise CommandError(f"out of memory with {len(images)} images at a time; try a smaller --batch-size") from error
    texts, errors = {}, {}
    for file, image in images.items():
        text, reason = _answer_batch(model, processor, {file: image}, prompt, max_new_tokens)
        texts |= text
        errors |= reason
    return texts, errors


def _run(
    patterns: list[str],
    result_of,
    prompt: str | None,
    model: str | None,
    device: str | None,
    dtype: str | None,
    max_new_tokens: int,
    batch_size: int,
    recursive: bool,
    as_json: bool,
) -> None:
    """Answer about everything that `patterns` stand for, and print it.

    Args:
        result_of: Turns a text into the keys that a line of JSON has beside `image`.
    """
    from tqdm import tqdm

    from .images import ImageError, expand_paths

    _device_and_dtype(device, dtype)  # refused before anything is read
    failed = 0

    def report(path, reason: str) -> None:
        nonlocal failed
        failed += 1
        if as_json:
            _print(json.dumps({"image": str(path), "error": reason}), sys.stdout)
        else:
            _print(f"vlbridge: error: {path}: {reason}", sys.stderr)

    files = {}
    for pattern in patterns:
        try:
            for file in expand_paths([pattern], recursive=recursive):
                files.setdefault(os.path.abspath(file), file)
        except ImageError as error:
            report(error.path, error.reason)
    files = list(files.values())
    only_one = len(files) + failed == 1

    def load_model():
        _quiet_libraries()
        return load(model, device, dtype)

    on_terminal = sys.stderr.isatty()
    show_bar = len(files) > (1 if on_terminal else batch_size)
    interval = 0.1 if on_terminal else 10.0  # seconds; a log file gets a line now and then
    with tqdm(total=len(files), unit="image", file=sys.stderr, mininterval=interval, disable=not show_bar) as bar:
        for file, text, reason in _answer_files(files, load_model, prompt, max_new_tokens, batch_size):
            if text is None:
                report(file, reason)
            elif as_json:
                _print(json.dumps({"image": str(file), **result_of(text)}), sys.stdout)
            else:
                text = " ".join(text.split())  # one line per image
                _print(text if only_one else f"{file}\t{text}", sys.stdout)
            bar.update()
    if failed:
        raise typer.Exit(1)


@app.command()
@_exit_codes()
def caption(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Files, folders or quoted globs.")],
    model: ModelOption = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What to ask for.", show_default="the model's own")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_new_tokens: MaxNewTokensOption = 40,
    batch_size: BatchSizeOption = 8,
    recursive: RecursiveOption = False,
    as_json: JsonOption = False,
) -> None:
    """Describe images.

    One image gives its caption; several give a line "path<TAB>caption" each.
    """
    _run(
        images,
        lambda text: {"caption": text},
        prompt,
        model,
        device,
        dtype,
        max_new_tokens,
        batch_size,
        recursive,
        as_json,
    )


@app.command()
@_exit_codes()
def ask(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Files, folders or quoted globs.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about each of them.")],
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_new_tokens: MaxNewTokensOption = 40,
    batch_size: BatchSizeOption = 8,
    recursive: RecursiveOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a question about images.

    One image gives its answer; several give a line "path<TAB>answer" each.
    """
    if os.path.exists(question):
        raise CommandError(f"the last argument must be the question, but {question!r} is a file or folder", exit_code=2)
    if not question.strip():
        raise CommandError("the question is empty", exit_code=2)
    _run(
        images,
        lambda text: {"question": question, "answer": text},
        question,
        model,
        device,
        dtype,
        max_new_tokens,
        batch_size,
        recursive,
        as_json,
    )


# ---------------------------------------------------------------------- info


def describe(model: str | None = None) -> dict:
    """What a bridged model is made of, from its configuration alone: no weights are read.

    Args:
        model: Folder, or id on the Hub; `None` takes the embedded bridge.

    Returns:
        `model`, `model_type`, `class`, `parts` (one dict each: `name`, `class`, `model_type`, `source`,
        `trainable_parameters`, `parameters`), `trainable_parameters`, `parameters`, `image_size` (pixels),
        `fewest_image_tokens` and `image_tokens` (visual tokens of one image, at least and at most),
        `prompt_tokens_per_image` (positions that they take in the language model's input, at most), `context_window` and
        `context_left` (tokens; `None` where positions have no limit).

    Raises:
        CommandError: There is no such model, or it is not a bridged one.
    """
    import torch
    from transformers import AutoModel

    from . import default_model

    model = default_model() if model is None else os.path.expanduser(model)
    with _loading(model):
        config = _bridged_config(model)
        with torch.device("meta"):
            built = AutoModel.from_config(config)
    config = built.config
    parts = []
    for name in ("vision_model", "bridge", "language_model"):
        part = getattr(built, name)
        frozen = (config.frozen_parts or {}).get(name) or {}
        source = frozen.get("source")
        if source and frozen.get("revision"):
            source = f"{source}@{frozen['revision'][:12]}"
        parts.append(
            {
                "name": name,
                "class": type(part).__name__,
                "model_type": config.model_type if name == "bridge" else part.config.model_type,
                "source": model if name == "bridge" or source is None else source,
                **_parameters(part),
            }
        )
    fewest, image_tokens = config.image_token_range()
    prompt_tokens = image_tokens if config.visual_tokens_in_prompt else 1  # the <image> that stands for them
    window = getattr(config.text_config.get_text_config(), "max_position_embeddings", None)
    return {
        "model": model,
        "model_type": config.model_type,
        "class": type(built).__name__,
        "parts": parts,
        **_parameters(built),
        "image_size": config.image_size,
        "fewest_image_tokens": fewest,
        "image_tokens": image_tokens,
        "prompt_tokens_per_image": prompt_tokens,
        "context_window": window,
        "context_left": None if window is None else window - prompt_tokens,
    }


def _parameters(module) -> dict[str, int]:
    parameters = list(module.parameters())
    return {
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
    }


def _described(about: dict) -> Iterator[str]:
    """Lines for people."""
    yield f"{about['model']}: {about['model_type']}, {about['class']}"
    yield ""
    rows = [("part", "class", "model type", "trainable", "parameters", "source")]
    for part in [*about["parts"], {**about, "name": "altogether", "class": "", "model_type": "", "source": ""}]:
        counts = (f"{part[key]:,}" for key in ("trainable_parameters", "parameters"))
        rows.append((part["name"], part["class"], part["model_type"], *counts, part["source"]))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        cells = (
            cell.rjust(width) if column in (3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
    yield ""
    size, tokens, in_prompt = (about[key] for key in ("image_size", "image_tokens", "prompt_tokens_per_image"))
    if about["fewest_image_tokens"] < tokens:
        yield f"visual tokens per image: {about['fewest_image_tokens']} to {tokens} (tiles of {size} x {size} pixels)"
    else:
        yield f"visual tokens per image: {tokens} ({size} x {size} pixels), {in_prompt} in the prompt"
    window, left = about["context_window"], about["context_left"]
    if window is None:
        yield "context window: the language model's configuration sets no limit"
    elif left < 0:
        yield f"context window: {window:,} tokens; one image does not fit ({-left:,} too many)"
    else:
        yield f"context window: {window:,} tokens; one image leaves {left:,} ({left / window:.1%}) for text"


@app.command()
@_exit_codes()
def info(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder, or id on the Hub.", show_default="the embedded bridge"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show a model's parts, parameters and token budget, without its weights."""
    _quiet_libraries()
    about = describe(model)
    for line in [json.dumps(about)] if as_json else _described(about):
        _print(line, sys.stdout)


# ---------------------------------------------------------------------- data


@app.command()
@_exit_codes()
def capfilt(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Images with captions: JSON, JSON Lines, CSV, TSV, COCO's, or a folder with metadata.jsonl.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to, or to go on in.")],
    captioner: Annotated[
        str | None, typer.Option(help="Bridged model, stage 1 of BLIP-2, or BLIP: a folder or Hub id.")
    ] = None,
    filter: Annotated[
        str | None, typer.Option(help="Stage 1 of BLIP-2, or BLIP's image-text matcher: a folder or Hub id.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that images are relative to.", show_default="that of DATA")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Probability of a match from which on captions are kept.")
    ] = 0.5,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What captions begin with.", show_default="the captioner's own")
    ] = None,
    num_captions: Annotated[
        int | None, typer.Option(min=0, help="To generate per image; 0 filters only.", show_default="1")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest caption, in tokens.", show_default="30")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Of nucleus sampling.", show_default="0.9")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the captions.", show_default="0")] = None,
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Clean image-text pairs (CapFilt): caption the images anew, score all captions, keep those that match.

    A run that was cut short goes on where it was. With scores of all images, another --threshold computes nothing anew.
    """
    chosen_device, default_dtype = _device_and_dtype(device, dtype)
    _quiet_libraries()
    from .training import training_capfilt

    def load_models(settings, device):
        loaded = None
        if settings.num_captions:
            with _loading(settings.captioner):
                loaded = training_capfilt.load_captioner(settings.captioner, settings.prompt, settings.dtype, device)
        with _loading(settings.filter):
            return loaded, training_capfilt.load_matcher(settings.filter, settings.dtype, device)

    try:
        settings = training_capfilt.settings_for(
            output, default_dtype, captioner=captioner, filter=filter, prompt=prompt, num_captions=num_captions,
            max_new_tokens=max_new_tokens, top_p=top_p, seed=seed, dtype=dtype,
        )  # fmt: skip
        samples = training_capfilt.read_samples(data, images)
        summary = training_capfilt.capfilt(
            samples, output, settings, threshold=threshold, batch_size=batch_size, device=chosen_device,
            load=load_models,
        )  # fmt: skip
    except (OSError, ValueError, FloatingPointError) as error:
        raise CommandError(_one_line(error)) from error
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise CommandError(f"out of memory with {batch_size} images at a time; try a smaller --batch-size") from error
    for image, reason in summary["failed"].items():
        _print(f"vlbridge: error: {image}: {reason}", sys.stderr)
    for source in ("web", "synthetic"):
        counts = summary[source]
        _print(f"{source}: {counts['kept']:,} of {counts['captions']:,} captions kept", sys.stdout)
    if summary["failed"]:
        raise CommandError(f"{len(summary['failed'])} of {summary['images']} images could not be read")


data_commands = typer.Typer(
    name="data", help="Look into data before training on it.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_commands)

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Its layout: llava, coco_captions, vqav2, imagefolder, webdataset, interleaved, easy_vqa, hub.",
    ),
]
DataPathArgument = Annotated[
    str | None,
    typer.Argument(metavar="PATH", help="File, folder or quoted glob.", show_default="easy_vqa fetches its own"),
]
SplitOption = Annotated[str | None, typer.Option(help="Part of the data set, such as train or val2014.")]
StreamingOption = Annotated[
    bool, typer.Option("--streaming", help="Read while checking, without a copy in the cache of datasets.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of the source, such as images=FOLDER; may be repeated."),
]


@contextmanager
def _reading_data(source: str):
    """Turn what is wrong with data into an error of one line."""
    try:
        import datasets
    except ImportError as error:
        raise CommandError('reading training data needs datasets: pip install "vlbridge[train]"') from error
    _quiet_libraries()
    datasets.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CommandError(f"{source}: {_one_line(error)}") from error


def _load_records(source: str, path: str | None, split: str | None, streaming: bool, settings: list[str] | None):
    """The data set that the command line names.

    Raises:
        CommandError: There is no such source, or an option is no KEY=VALUE.
    """
    import yaml

    from .training.training_data import SOURCES, load

    if source not in SOURCES:
        raise CommandError(f"SOURCE is {source!r}; expected one of {', '.join(SOURCES)}", exit_code=2)
    options = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise CommandError(f"--set {setting}: expected KEY=VALUE", exit_code=2)
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise CommandError(f"--set {setting}: {_one_line(error)}", exit_code=2) from error
    return load(source, path, split=split, streaming=streaming, **options)


@data_commands.command("check")
@_exit_codes()
def check_data(
    source: SourceArgument,
    path: DataPathArgument = None,
    split: SplitOption = None,
    streaming: StreamingOption = False,
    settings: SetOption = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Look at this many records only.", show_default="all of them")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample, and of what the sheet shows.")] = 0,
    sheet: Annotated[Path | None, typer.Option(help="Picture to write: some records with their texts.")] = None,
    cells: Annotated[int, typer.Option(min=1, help="Records on it.")] = 24,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Count tokens as this model does: a folder or Hub id.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest record, in tokens.", show_default="the model's context window")
    ] = None,
    max_broken: Annotated[
        float, typer.Option(min=0, help="Largest share (below 1) or number of records that may be broken.")
    ] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Open every image, read every text, and say whether the data is fit for training.

    Ends with exit code 1 where it is not.
    """
    from PIL import Image

    if sheet is not None and sheet.suffix.lower() not in Image.registered_extensions():
        raise CommandError(f"--sheet {sheet}: expected a picture's name, such as sheet.png", exit_code=2)
    processor = None
    with _reading_data(source):
        records = _load_records(source, path, split, streaming, settings)
    if model is not None:
        from transformers import AutoProcessor

        model = os.path.expanduser(model)
        with _loading(model):
            text_config = _bridged_config(model).text_config.get_text_config()
            processor = AutoProcessor.from_pretrained(model)
        max_length = max_length or getattr(text_config, "max_position_embeddings", None)
    with _reading_data(source):
        from .training.training_data_check import check_data, contact_sheet

        report, shown = check_data(
            records, sample=sample, seed=seed, max_broken=max_broken, processor=processor, window=max_length,
            num_cells=0 if sheet is None else cells, progress=sys.stderr.isatty(),
        )  # fmt: skip
        if sheet is not None and shown:
            partial = sheet.with_name(f".{sheet.stem}.partial{sheet.suffix}")
            contact_sheet(shown).save(partial)
            os.replace(partial, sheet)
    for line in [json.dumps(report.as_dict())] if as_json else report.lines():
        _print(line, sys.stdout)
    if not report.ok:
        raise typer.Exit(1)


@data_commands.command("show")
@_exit_codes()
def show_data(
    source: SourceArgument,
    path: DataPathArgument = None,
    split: SplitOption = None,
    streaming: StreamingOption = False,
    settings: SetOption = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many.")] = 3,
    skip: Annotated[int, typer.Option(min=0, help="Begin behind so many.")] = 0,
) -> None:
    """Print records as training sees them, one JSON object per line."""
    from .compat import take

    with _reading_data(source):
        records = _load_records(source, path, split, streaming, settings)
        for record in take(records.skip(skip), number):
            for image in record["images"]:
                if image["bytes"] is not None:
                    image["bytes"] = f"{len(image['bytes']):,} bytes"
            _print(json.dumps(record, ensure_ascii=False), sys.stdout)


# ---------------------------------------------------------------------- training


@app.command()
@_exit_codes()
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
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder, if there is one.")
    ] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="Show the shipped recipes and exit.")] = False,
) -> None:
    """Train a bridge from a recipe; on several devices with `accelerate launch -m vlbridge.cli train ...`."""
    from .training.training_recipes import RecipeError, read_recipe, shipped

    if list_recipes:
        width = max(map(len, shipped()))
        for name in shipped():
            _print(f"{name:{width}}  {read_recipe(name).description}", sys.stdout)
        return
    if recipe is None:
        raise CommandError("name a recipe: a YAML file, or one of those that --list shows", exit_code=2)
    try:
        chosen = read_recipe(recipe, settings or ())
    except RecipeError as error:
        raise CommandError(_one_line(error), exit_code=2) from error
    output = Path(Path(recipe).stem) if output is None else output
    try:
        from .training.training_failures import TrainingError
        from .training.training_run import train
    except ModuleNotFoundError as error:
        raise CommandError(f"{error}; training needs more packages: pip install 'vlbridge[train]'") from error
    try:
        summary = train(chosen, output, resume=resume)
    except RecipeError as error:
        raise CommandError(_one_line(error), exit_code=2) from error
    except (OSError, ValueError, TrainingError) as error:
        raise CommandError(_one_line(error)) from error
    for row in summary["evaluation"]:
        _print(f"{row['dataset']} ({row['split']}): {row['metric']} {row['value']:.4f}", sys.stdout)
    _print(f"{output}: {summary['steps']} steps in {summary['seconds'] / 60:.1f} minutes", sys.stdout)


# ---------------------------------------------------------------------- conversion


BERT = "google-bert/bert-base-uncased"  # whose tokenizer all of BLIP uses
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"


class _Converters(typer.core.TyperGroup):
    """`convert FAMILY ...` for a checkpoint at hand, `convert NAME OUTPUT` for a release of the catalogue."""

    def resolve_command(self, ctx, args):
        if args and args[0] not in self.commands:
            args = ["release", *args]
        return super().resolve_command(ctx, args)


converters = typer.Typer(
    name="convert",
    cls=_Converters,
    help="Convert official checkpoints: a release by its name (`vlbridge list`), or the files of a family.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(converters)

OutputOption = Annotated[Path, typer.Option(help="Folder to write to.")]
TokenizerOption = Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the language model.")]
ConfigOption = Annotated[Path | None, typer.Option(help="JSON file: what shapes can't tell, such as head counts.")]
VerifyOption = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Check what was written, and say so in conversion.json.")
]


def _fields(path: Path | None) -> dict:
    """A JSON object from a file.

    Raises:
        CommandError: There is none.
    """
    if path is None:
        return {}
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"--config {path}: {_one_line(error)}", exit_code=2) from error
    if not isinstance(fields, dict):
        raise CommandError(f"--config {path} holds a {type(fields).__name__}, expected an object", exit_code=2)
    return fields


def _convert(converter: str, checkpoint: Path | str, output: Path, config: Path | None, **options) -> None:
    """Convert, and say what came of it.

    Args:
        converter: Its name in `vlbridge.convert`.
        checkpoint: A file; a `str` may be a folder or a Hub id too.
        output: Folder to write to.
        config: JSON file with fields for the converter.
        options: For the converter.

    Raises:
        CommandError: It can't be done.
    """
    fields = _fields(config)
    elsewhere = isinstance(checkpoint, str) and (os.path.isdir(checkpoint) or re.fullmatch(HUB_ID, checkpoint))
    if not os.path.isfile(checkpoint) and not elsewhere:
        what = "file" if isinstance(checkpoint, Path) else "file or folder, and no Hub id"
        raise CommandError(f"--checkpoint {checkpoint}: no such {what}")
    _quiet_libraries()
    from . import convert

    try:
        done = getattr(convert, converter)(checkpoint, output=output, config=fields, **options)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"cannot convert {checkpoint}: {_one_line(error)}") from error
    _say_converted(done, output)


def _say_converted(done, output: Path) -> None:
    for note in done.notes:
        _print(note, sys.stderr)
    parameters = sum(parameter.numel() for parameter in done.model.parameters())
    _print(f"{output}: {done.config.model_type}, {parameters:,} parameters", sys.stdout)


@converters.command("release", hidden=True)
@_exit_codes()
def convert_release(
    name: Annotated[str, typer.Argument(help="Of a release, as `vlbridge list` shows it.")],
    output: Annotated[Path, typer.Argument(help="Folder to write to.")],
    vision: Annotated[str | None, typer.Option(help="Another place of the vision encoder.")] = None,
    language: Annotated[str | None, typer.Option(help="Another place of the language model.")] = None,
    tokenizer: TokenizerOption = None,
    config: ConfigOption = None,
    verify: VerifyOption = True,
) -> None:
    """An official release: what belongs to it is fetched from where its publishers put it."""
    from .catalogue import convert_release, find

    fields = _fields(config)
    try:
        release = find(name)
    except ValueError as error:
        raise CommandError(str(error), exit_code=2) from error
    _quiet_libraries()
    given = {"vision": vision, "language": language, "tokenizer": tokenizer, "config": fields or None, "verify": verify}
    try:
        done = convert_release(release, output, **given)
    except Exception as error:  # which ones a download raises depends on the HTTP client
        raise CommandError(f"cannot convert {name}: {_one_line(error)}") from error
    _say_converted(done, output)


@converters.command("openflamingo")
@_exit_codes()
def convert_openflamingo(
    checkpoint: Annotated[Path, typer.Option(help="checkpoint.pt, as released or as written during training.")],
    vision: Annotated[str, typer.Option(help="CLIP: a file in open_clip's layout, or a folder or Hub id.")],
    language: Annotated[str, typer.Option(help="The language model: a folder or Hub id.")],
    output: OutputOption,
    tokenizer: TokenizerOption = None,
    cross_attn_every_n_layers: Annotated[
        int | None, typer.Option(min=1, help="Checked against the checkpoint.")
    ] = None,
    config: ConfigOption = None,
    verify: VerifyOption = True,
) -> None:
    """OpenFlamingo: 3B, 4B, 9B, the first 9B, and checkpoints of its training code."""
    _convert(
        "convert_openflamingo", checkpoint, output, config, vision=vision, language=language, tokenizer=tokenizer,
        cross_attn_every_n_layers=cross_attn_every_n_layers, verify=verify,
    )  # fmt: skip


@converters.command("blip2")
@_exit_codes()
def convert_blip2(
    checkpoint: Annotated[
        str, typer.Option(help="LAVIS's file; or a folder or Hub id of transformers' BLIP-2 or InstructBLIP.")
    ],
    output: OutputOption,
    vision: Annotated[
        str | None,
        typer.Option(
            help="EVA ViT-g or CLIP ViT-L: LAVIS's file, or a folder or Hub id.", show_default="the checkpoint's own"
        ),
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="The language model: a folder or Hub id.", show_default="none: stage 1")
    ] = None,
    tokenizer: TokenizerOption = None,
    qformer_tokenizer: Annotated[
        str, typer.Option(help="BERT's tokenizer, for Q-Formers that read text: a folder or Hub id.")
    ] = BERT,
    config: ConfigOption = None,
    verify: VerifyOption = True,
) -> None:
    """BLIP-2 and InstructBLIP: stage 1, OPT, FlanT5, Vicuna, with EVA ViT-g or CLIP ViT-L."""
    _convert(
        "convert_blip2", checkpoint, output, config, vision=vision, language=language, tokenizer=tokenizer,
        qformer_tokenizer=qformer_tokenizer, verify=verify,
    )  # fmt: skip


@converters.command("blip")
@_exit_codes()
def convert_blip(
    checkpoint: Annotated[Path, typer.Option(help="LAVIS's file of a captioner or an image-text matcher.")],
    output: OutputOption,
    tokenizer: Annotated[str, typer.Option(help="BERT's tokenizer: a folder or Hub id.")] = BERT,
    config: ConfigOption = None,
    verify: VerifyOption = True,
) -> None:
    """BLIP (2022), for transformers' BlipForConditionalGeneration and BlipForImageTextRetrieval."""
    _convert("convert_blip", checkpoint, output, config, tokenizer=tokenizer, verify=verify)


@converters.command("llava")
@_exit_codes()
def convert_llava(
    checkpoint: Annotated[
        str,
        typer.Option(
            help="A release, a LoRA fine-tune or a llava-hf repository: a folder or Hub id; or mm_projector.bin."
        ),
    ],
    output: OutputOption,
    vision: Annotated[
        str | None,
        typer.Option(
            help="The vision encoder: a folder or Hub id, or a file in open_clip's layout.",
            show_default="the checkpoint's own, or the one it names",
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="The language model of a projector or of LoRA: a folder or Hub id.",
            show_default="the checkpoint's own, or the one it names",
        ),
    ] = None,
    conversation: Annotated[
        str | None,
        typer.Option(help="Name of the conversation format, such as vicuna_v1.", show_default="the checkpoint's"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="JSON file: fields of MLPLlavaConfig that are to be others than the checkpoint's."),
    ] = None,
    verify: VerifyOption = True,
) -> None:
    """LLaVA v1, v1.5 and v1.6 (NeXT): whole, projector alone, LoRA, and transformers' llava-hf."""
    _convert(
        "convert_llava", checkpoint, output, config, vision=vision, language=language, conversation=conversation,
        verify=verify,
    )  # fmt: skip


@app.command()
@_exit_codes()
def export(
    model: Annotated[str, typer.Argument(help="A model of vlbridge: a folder or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")],
    to: Annotated[
        str,
        typer.Option(
            help="transformers: the native class, for whatever knows transformers; official: the layout of the family's own "
            "code."
        ),
    ] = "transformers",
    verify: VerifyOption = True,
) -> None:
    """Write a model for those who have no vlbridge."""
    _quiet_libraries()
    from .convert import export
    from .convert.convert_export import TARGETS

    if to not in TARGETS:
        raise CommandError(f"--to is {to!r}; expected one of {', '.join(TARGETS)}", exit_code=2)
    try:
        done = export(model, output, to, verify=verify)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"cannot export {model}: {_one_line(error)}") from error
    _say_converted(done, output)


@app.command()
@_exit_codes()
def transplant(
    bridge: Annotated[str, typer.Argument(help="A bridge: a folder or Hub id.")],
    language: Annotated[str, typer.Option(help="The language model to put it on: a folder or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")],
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Warm-start a bridge on another language model, through the tokens that both models know."""
    if output.exists():
        raise CommandError(f"--output {output} exists already; give another folder")
    _quiet_libraries()
    from .transplant import describe, transplant

    try:
        done = transplant(bridge, language, tokenizer=tokenizer)
        done.save(output)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"cannot transplant {bridge}: {_one_line(error)}") from error
    _print(json.dumps(done.report) if as_json else f"{output}: {describe(done.report)}", sys.stdout)


@app.command("list")
@_exit_codes()
def list_releases(as_json: JsonOption = False) -> None:
    """The official releases that `vlbridge convert NAME OUTPUT` knows."""
    from .catalogue import CATALOGUE, rows

    if as_json:
        for row in rows():
            _print(json.dumps(row), sys.stdout)
        return
    width = max(map(len, CATALOGUE))
    for release in CATALOGUE.values():
        figures = ", ".join(
            f"{what} {value}" for what, value in release.published.items() if isinstance(value, (int, float))
        )
        shots = {what: value for what, value in release.published.items() if isinstance(value, dict)}
        figures = figures or ", ".join(
            f"{what} {' / '.join(map(str, value.values()))}" for what, value in list(shots.items())[:2]
        )
        _print(f"{release.name:{width}}  {release.title}" + (f"  ({figures})" if figures else ""), sys.stdout)


# ---------------------------------------------------------------------- the Hub


@app.command()
@_exit_codes()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A saved model: whole, or a bridge alone.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME; it is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add the code, for those who have transformers alone.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.", show_default="the main one")] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="Of the commit.")] = "Upload model",
) -> None:
    """Upload a saved model to the Hub, in one commit; with a model card where the folder has none."""
    _quiet_libraries()
    from .hub import push_saved

    try:
        done = push_saved(
            folder, repo, with_code=with_code, private=private or None, revision=revision, commit_message=message
        )
    except Exception as error:  # which ones depends on the HTTP client of this version of huggingface_hub
        raise CommandError(f"cannot push {folder} to {repo}: {_one_line(error)}") from error
    _print(done.commit_url, sys.stdout)


# ---------------------------------------------------------------------- entry


def _print_version(wanted: bool) -> None:
    if wanted:
        from .version import __version__

        _print(f"vlbridge {__version__}", sys.stdout)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


__all__ = ["CommandError", "answer", "app", "describe", "load"]


if __name__ == "__main__":
    app()
