"""The command line: `vlbridge caption`, `ask`, `info`, `inspect`, `train`, `evaluate`, `convert`, `push`, ....

Exit codes: 0, all went well; 1, something failed (a model, a device, some of the images); 2, the command line is wrong;
130, interrupted. Results go to stdout, everything else to stderr.

The subcommands are in the modules `cli_*`; here they are put together.
"""

import json
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from .cli_bakeoff import bakeoff
from .cli_common import (
    CommandError,
    JsonOption,
    exit_codes,
    loading,
    one_line,
    print_line,
    quiet_libraries,
    refuse_adapters,
)
from .cli_compare import compare
from .cli_convert import converters, export, transplant
from .cli_data import capfilt, data_commands
from .cli_evaluate import evaluate
from .cli_inspect import inspect
from .cli_page import page
from .cli_run import ask, caption
from .cli_serve import serve
from .cli_train import new_recipe, train


LIBRARIES = ("transformers", "torch", "peft", "accelerate", "huggingface_hub")  # whose versions `--version` shows

app = typer.Typer(
    name="vlbridge",
    help="Bridges between frozen vision encoders and frozen language models: caption and ask, train, evaluate, look "
    "inside, convert and publish.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@exit_codes()
def info(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder, or id on the Hub.", show_default="the embedded bridge"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show a model's parts, parameters and token budget.

    No weights are loaded.
    """
    quiet_libraries()
    from vlbridge.inference import model_source
    from vlbridge.summary import summarize, summary_lines

    source = model_source(model)
    with loading(source):
        summary = summarize(source)
    for line in [json.dumps(summary)] if as_json else summary_lines(summary):
        print_line(line, sys.stdout)


@exit_codes()
def list_releases(as_json: JsonOption = False) -> None:
    """List the official releases, with their published figures.

    vlbridge convert NAME OUTPUT downloads a release and converts it.
    """
    from vlbridge.catalogue import CATALOGUE, rows

    if as_json:
        for row in rows():
            print_line(json.dumps(row), sys.stdout)
        return
    width = max(map(len, CATALOGUE))
    for release in CATALOGUE.values():
        figures = _published_figures(release.published)
        print_line(f"{release.name:{width}}  {release.title}" + (f"  ({figures})" if figures else ""), sys.stdout)


def _published_figures(published: dict) -> str:
    """Single figures if there are any, else the first two series, such as scores by number of shots."""
    figures = [f"{metric} {value}" for metric, value in published.items() if isinstance(value, (int, float))]
    series = [
        f"{metric} {' / '.join(map(str, value.values()))}"
        for metric, value in published.items()
        if isinstance(value, dict)
    ]
    return ", ".join(figures or series[:2])


@exit_codes()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A saved model: the full model, or a bridge.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME; it is created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add the code, so that transformers alone can load the model.")
    ] = False,
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            metavar="PART=ID",
            help="Hub id with the same weights as a part that was composed from a local folder, such as "
            "vision_model=openai/clip-vit-base-patch32; may be repeated.",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.", show_default="the main one")] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="Commit message.")] = "Upload model",
    as_json: JsonOption = False,
) -> None:
    """Upload a saved model to the Hub.

    The upload is one commit. A model card is added if the folder has none.
    """
    named = dict(part.partition("=")[::2] for part in parts or ())
    if not all(named.values()):
        raise CommandError("--part: expected PART=ID, such as vision_model=openai/clip-vit-base-patch32", exit_code=2)
    refuse_adapters(folder)
    quiet_libraries()
    from vlbridge.hub import PublishedError, push_saved

    try:
        done = push_saved(
            folder, repo, with_code=with_code, parts=named, private=private or None, revision=revision,
            commit_message=message,
        )  # fmt: skip
    except PublishedError as error:
        raise CommandError(one_line(error)) from error
    except Exception as error:  # which ones depends on the HTTP client of this version of huggingface_hub
        refused = getattr(getattr(error, "response", None), "status_code", None) == 401
        hint = " Log in first: hf auth login" if refused else ""
        raise CommandError(f"cannot push {folder} to {repo}: {one_line(error)}{hint}") from error
    about = {"repository": done.repo_url.repo_id, "commit": done.oid, "url": done.commit_url}
    print_line(json.dumps(about) if as_json else done.commit_url, sys.stdout)


# ---------------------------------------------------------------------- the whole


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        for name in ("vlbridge", *LIBRARIES):
            with suppress(PackageNotFoundError):
                print_line(f"{name} {version(name)}", sys.stdout)
        print_line(f"python {platform.python_version()}", sys.stdout)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    pass


for command in (caption, ask, compare, info, inspect, capfilt, train, evaluate, bakeoff, export, transplant):
    app.command()(command)
app.command("new-recipe")(new_recipe)
app.command("list")(list_releases)
app.command()(push)
app.command(context_settings={"allow_extra_args": True})(serve)
app.command("app")(page)
app.add_typer(data_commands)
app.add_typer(converters)


__all__ = ["app"]
