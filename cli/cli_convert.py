"""`vlbridge convert`, `export` and `transplant`: models into other formats and onto other language models."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from .cli_common import (
    CommandError,
    JsonOption,
    exit_codes,
    look_up,
    one_line,
    print_line,
    quiet_libraries,
    refuse_adapters,
)


BERT = "google-bert/bert-base-uncased"  # whose tokenizer all of BLIP uses
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"


class ConverterGroup(typer.core.TyperGroup):
    """`convert FAMILY ...` for files that the user has, `convert NAME OUTPUT` for a release of the catalogue."""

    def resolve_command(self, ctx, args):
        if args and args[0] not in self.commands:
            args = ["release", *args]
        return super().resolve_command(ctx, args)


converters = typer.Typer(
    name="convert",
    cls=ConverterGroup,
    help="Convert an official checkpoint.\n\nvlbridge convert NAME OUTPUT downloads a release and converts it; "
    "vlbridge list shows the names, and vlbridge convert NAME --help the options. vlbridge convert FAMILY ... converts "
    "files that you have.",
    subcommand_metavar="{NAME OUTPUT | FAMILY} [OPTIONS]",
    no_args_is_help=True,
    rich_markup_mode=None,
)

OutputOption = Annotated[Path, typer.Option(help="Folder to write to.")]
TokenizerOption = Annotated[
    str | None, typer.Option(help="The tokenizer, if it is not with the language model: a folder or Hub id.")
]
ConfigOption = Annotated[
    Path | None, typer.Option(help="JSON file with settings that tensor shapes do not show, such as numbers of heads.")
]
VerifyOption = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Check what was written, and record the result in conversion.json.")
]


def _config_fields(path: Path | None) -> dict:
    """The JSON object in the file of `--config`; empty without one.

    Raises:
        CommandError: The file can't be read, or holds something else.
    """
    if path is None:
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"--config {path}: {one_line(error)}", exit_code=2) from error
    if not isinstance(fields, dict):
        raise CommandError(f"--config {path} holds a {type(fields).__name__}, expected an object", exit_code=2)
    return fields


def _convert(converter: str, checkpoint: Path | str, output: Path, config: Path | None, **options) -> None:
    """Convert a checkpoint, and print the result.

    Args:
        converter: Name of the function in `vlbridge.convert`.
        checkpoint: A file; a `str` may also be a folder or a Hub id.
        output: Folder to write to.
        config: JSON file with fields for the converter.
        options: Further arguments of the converter.

    Raises:
        CommandError: The checkpoint can't be converted.
    """
    fields = _config_fields(config)
    is_source = isinstance(checkpoint, str) and (os.path.isdir(checkpoint) or re.fullmatch(HUB_ID, checkpoint))
    if not os.path.isfile(checkpoint) and not is_source:
        what = "file" if isinstance(checkpoint, Path) else "file or folder, and no Hub id"
        raise CommandError(f"--checkpoint {checkpoint}: no such {what}")
    quiet_libraries()
    from vlbridge import convert

    try:
        done = getattr(convert, converter)(checkpoint, output=output, config=fields, **options)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"cannot convert {checkpoint}: {one_line(error)}") from error
    _print_conversion(done, output)


def _print_conversion(conversion, output: Path) -> None:
    for note in conversion.notes:
        print_line(note, sys.stderr)
    parameters = sum(parameter.numel() for parameter in conversion.model.parameters())
    print_line(f"{output}: {conversion.config.model_type}, {parameters:,} parameters", sys.stdout)


@converters.command("release", hidden=True)
@exit_codes()
def release(
    name: Annotated[str, typer.Argument(help="Name of a release, as shown by `vlbridge list`.")],
    output: Annotated[Path, typer.Argument(help="Folder to write to.")],
    vision: Annotated[
        str | None, typer.Option(help="Vision encoder to use instead of the official one: a folder or Hub id.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Language model to use instead of the official one: a folder or Hub id.")
    ] = None,
    tokenizer: TokenizerOption = None,
    config: ConfigOption = None,
    verify: VerifyOption = True,
) -> None:
    """Convert an official release.

    Its files are downloaded from where they were published.
    """
    from vlbridge.catalogue import find
    from vlbridge.convert.convert_release import convert_release as convert

    fields = _config_fields(config)
    try:
        found = find(name)
    except ValueError as error:
        raise CommandError(str(error), exit_code=2) from error
    quiet_libraries()
    given = {"vision": vision, "language": language, "tokenizer": tokenizer, "config": fields or None, "verify": verify}
    try:
        if isinstance(found.checkpoint, str):
            look_up(found.checkpoint)
        done = convert(found, output, **given)
    except Exception as error:  # which ones a download raises depends on the HTTP client
        raise CommandError(f"cannot convert {name}: {one_line(error)}") from error
    _print_conversion(done, output)


@converters.command("openflamingo")
@exit_codes()
def openflamingo(
    checkpoint: Annotated[Path, typer.Option(help="checkpoint.pt, as released or as written during training.")],
    vision: Annotated[str, typer.Option(help="CLIP: a file in open_clip's layout, or a folder or Hub id.")],
    language: Annotated[str, typer.Option(help="The language model: a folder or Hub id.")],
    output: OutputOption,
    tokenizer: TokenizerOption = None,
    cross_attn_every_n_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers per cross-attention layer; checked against the checkpoint.")
    ] = None,
    config: ConfigOption = None,
    verify: VerifyOption = True,
) -> None:
    """Convert OpenFlamingo.

    Reads 3B, 4B, 9B, the first 9B, and checkpoints of its training code.
    """
    _convert(
        "convert_openflamingo", checkpoint, output, config, vision=vision, language=language, tokenizer=tokenizer,
        cross_attn_every_n_layers=cross_attn_every_n_layers, verify=verify,
    )  # fmt: skip


@converters.command("blip2")
@exit_codes()
def blip2(
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
    """Convert BLIP-2 and InstructBLIP.

    Reads stage 1, and models with OPT, FlanT5 or Vicuna, with EVA ViT-g or CLIP ViT-L.
    """
    _convert(
        "convert_blip2", checkpoint, output, config, vision=vision, language=language, tokenizer=tokenizer,
        qformer_tokenizer=qformer_tokenizer, verify=verify,
    )  # fmt: skip


@converters.command("blip")
@exit_codes()
def blip(
    checkpoint: Annotated[Path, typer.Option(help="LAVIS's file of a captioner or an image-text matcher.")],
    output: OutputOption,
    tokenizer: Annotated[str, typer.Option(help="BERT's tokenizer: a folder or Hub id.")] = BERT,
    config: ConfigOption = None,
    verify: VerifyOption = True,
) -> None:
    """Convert BLIP (2022).

    The result is a BlipForConditionalGeneration or BlipForImageTextRetrieval of transformers.
    """
    _convert("convert_blip", checkpoint, output, config, tokenizer=tokenizer, verify=verify)


@converters.command("llava")
@exit_codes()
def llava(
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
        typer.Option(help="JSON file with fields of MLPLlavaConfig that replace the checkpoint's."),
    ] = None,
    verify: VerifyOption = True,
) -> None:
    """Convert LLaVA v1, v1.5 and v1.6 (NeXT).

    Reads full models, projectors, LoRA fine-tunes, and llava-hf models of transformers.
    """
    _convert(
        "convert_llava", checkpoint, output, config, vision=vision, language=language, conversation=conversation,
        verify=verify,
    )  # fmt: skip


@exit_codes()
def export(
    model: Annotated[str, typer.Argument(help="A vlbridge model: a folder or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")],
    to: Annotated[
        str,
        typer.Option(
            help="transformers: the native class of transformers; official: the layout of the family's official code."
        ),
    ] = "transformers",
    verify: VerifyOption = True,
) -> None:
    """Write a model in a format that loads without vlbridge."""
    quiet_libraries()
    from vlbridge import convert
    from vlbridge.convert.convert_export import TARGETS

    if to not in TARGETS:
        raise CommandError(f"--to is {to!r}; expected one of {', '.join(TARGETS)}", exit_code=2)
    refuse_adapters(Path(model))
    try:
        done = convert.export(model, output, to, verify=verify)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"cannot export {model}: {one_line(error)}") from error
    _print_conversion(done, output)


@exit_codes()
def transplant(
    bridge: Annotated[str, typer.Argument(help="A bridge: a folder or Hub id.")],
    language: Annotated[str, typer.Option(help="The language model to put it on: a folder or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")],
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move a trained bridge to another language model.

    The result is a start for training: a map between the embeddings of the tokens that both models share is multiplied
    into the bridge's last layer.
    """
    if output.exists():
        raise CommandError(f"--output {output} exists already; give another folder")
    refuse_adapters(Path(bridge))
    quiet_libraries()
    from vlbridge.transplant import describe
    from vlbridge.transplant import transplant as transplant_bridge

    try:
        done = transplant_bridge(bridge, language, tokenizer=tokenizer)
        done.save(output)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"cannot transplant {bridge}: {one_line(error)}") from error
    print_line(json.dumps(done.report) if as_json else f"{output}: {describe(done.report)}", sys.stdout)


__all__ = ["converters", "export", "transplant"]
