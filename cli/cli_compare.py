"""`vlbridge compare`: what several models say about the same pictures."""

import json
import sys
from typing import Annotated

import typer

from .cli_common import CommandError, DeviceOption, DtypeOption, JsonOption, exit_codes, one_line, print_line
from .cli_run import IMAGES, MaxNewTokensOption, RecursiveOption, load_model, warn_of_photographs


@exit_codes()
def compare(
    images: Annotated[list[str], IMAGES],
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="What to ask.", show_default="a caption is asked for")
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="A model; give it several times.", show_default="the embedded bridges"),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_new_tokens: MaxNewTokensOption = 40,
    recursive: RecursiveOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what several models say about the same images.

    The models are loaded one after the other. "embedded" is the embedded bridge. For whole data sets see
    vlbridge evaluate and bakeoff.
    """
    from vlbridge.assets import EMBEDDED, SHIPPED
    from vlbridge.images import ImageError, expand_paths, load_image
    from vlbridge.inference import BATCH_SIZE, answer_each

    if question is not None and not question.strip():
        raise CommandError("--question is empty", exit_code=2)
    models = models or [f"{EMBEDDED}-{bridge}" for bridge in SHIPPED]
    try:
        pictures = {str(file): load_image(file) for file in expand_paths(images, recursive)}
    except ImageError as error:
        raise CommandError(f"{error.path}: {error.reason}") from error
    said: dict[str, dict[str, str]] = {name: {} for name in pictures}
    for name in models:
        model, processor = load_model(name, device, dtype)
        asked = processor.caption_prompt if question is None else question
        shown = list(pictures.values())
        batches = (shown[start : start + BATCH_SIZE] for start in range(0, len(shown), BATCH_SIZE))
        found = [
            text
            for batch in batches
            for text in answer_each(model, processor, batch, asked, max_new_tokens=max_new_tokens)
        ]
        for picture, text in zip(pictures, found):
            if isinstance(text, ValueError):
                raise CommandError(f"{name}, {picture}: {one_line(text)}") from text
            said[picture][name] = text
        del model
    for model in models:
        for name, picture in pictures.items():
            if warn_of_photographs(model, picture, name, of_several=len(models) > 1):
                break  # once is enough
    width = max(map(len, models))
    for picture, answers in said.items():
        if as_json:
            print_line(json.dumps({"image": picture, "question": question, "answers": answers}), sys.stdout)
            continue
        print_line(picture if question is None else f"{picture}: {question}", sys.stdout)
        for name, text in answers.items():
            print_line(f"  {name:<{width}}  {text}", sys.stdout)
