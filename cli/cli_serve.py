"""`vlbridge serve`: an OpenAI-compatible endpoint."""

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import (
    CommandError,
    DeviceOption,
    DtypeOption,
    device_and_dtype,
    exit_codes,
    loading,
    one_line,
    print_line,
    quiet_libraries,
)


class EngineName(str, Enum):
    """What answers."""

    auto = "auto"
    vllm = "vllm"
    transformers = "transformers"


def parse_bridges(given: list[str]) -> dict[str, str]:
    """`NAME=PLACE` options as a dict.

    Raises:
        CommandError: One has another form, or a name is given twice.
    """
    found: dict[str, str] = {}
    for option in given:
        name, sign, place = option.partition("=")
        if not (name and sign and place) or ":" in name:
            raise CommandError(f"--bridge is {option!r}; expected NAME=FOLDER or NAME=HUB_ID", exit_code=2)
        if name in found:
            raise CommandError(f"--bridge has the name {name!r} twice", exit_code=2)
        found[name] = place
    return found


def choose_engine(engine: EngineName, source: str, bridges: dict[str, str], device: str | None) -> str:
    """`"vllm"` or `"transformers"`; says why on stderr if `auto` does not take vLLM though it is installed.

    Raises:
        CommandError: vLLM was asked for, and it can't serve this.
    """
    from transformers import AutoProcessor

    from vlbridge.inference import bridged_config
    from vlbridge.serving import refuse_for_vllm, vllm_problem
    from vlbridge.serving.serving_plugin import installed_vllm

    config = bridged_config(source, generates=True)
    if engine is EngineName.transformers:
        return "transformers"
    problem = vllm_problem() or refuse_for_vllm(config)
    problem = problem or refuse_for_vllm(config, AutoProcessor.from_pretrained(source))
    if problem is None and bridges:
        problem = (
            "vLLM keeps one bridge per server, and --bridge was given. Use --engine transformers, or start a server "
            "for each."
        )
    if problem is None and device is not None:
        problem = "vLLM chooses its device itself, and --device was given."
    if problem is None:
        return "vllm"
    if engine is EngineName.vllm:
        raise CommandError(problem)
    if installed_vllm() is not None:
        print_line(f"not with vLLM: {problem}", sys.stderr)
    return "transformers"


def vllm_command(source: str, name: str, host: str, port: int, dtype: str | None, limits, more: list[str]) -> list[str]:
    """The command line of `vllm serve`.

    Args:
        source: Folder or Hub id.
        name: What requests call the model.
        host: Address to listen at.
        port: Its port.
        dtype: As on the command line.
        limits: `vlbridge.serving.serving_requests.Limits`.
        more: Further arguments, for vLLM itself.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", source, "--host", host, "--port", str(port)]
    command += ["--served-model-name", name, "--middleware", "vlbridge.serving.serving_server.CheckedRequests"]
    command += ["--limit-mm-per-prompt", json.dumps({"image": limits.max_images})]
    command += [
        "--override-generation-config",
        json.dumps({"temperature": 0}),
    ]  # greedy unless a request says otherwise
    if dtype is not None:
        command += ["--dtype", dtype]
    if limits.media_folder is not None:
        command += ["--allowed-local-media-path", str(Path(limits.media_folder).resolve())]
    return command + more


@exit_codes()
def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Folder, or id on the Hub.", show_default="the embedded bridge")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option("--engine", help="auto takes vLLM where it is installed and can serve the model.")
    ] = EngineName.auto,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Its port.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What requests call the model.", show_default="the folder, or id"),
    ] = None,
    bridge: Annotated[
        list[str] | None,
        typer.Option("--bridge", metavar="NAME=PLACE", help="A further bridge on the same parts, asked as MODEL:NAME."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Most requests per batch.")] = 8,
    max_images: Annotated[int, typer.Option("--max-images", min=1, help="Pictures per request.")] = 8,
    max_megapixels: Annotated[float, typer.Option("--max-megapixels", min=0.01, help="Size of a picture.")] = 40,
    max_mebibytes: Annotated[float, typer.Option("--max-mebibytes", min=0.01, help="Size of a request.")] = 32,
    max_characters: Annotated[int, typer.Option("--max-characters", min=1, help="Text of a request.")] = 32_768,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer.")] = 1024,
    max_waiting: Annotated[int, typer.Option("--max-waiting", min=1, help="Requests at a time; more get 429.")] = 128,
    media_folder: Annotated[
        Path | None, typer.Option("--media-folder", help="Folder whose files requests may name as file:///....")
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures from http(s) addresses; never from private ones.")
    ] = False,
    text_only: Annotated[bool, typer.Option("--text-only", help="Take requests without a picture too.")] = False,
) -> None:
    """Answer OpenAI's chat requests over HTTP. What follows -- goes to `vllm serve`."""
    extra = list(context.args)
    if model is not None and model.startswith("-"):  # what follows -- without a model before it
        extra, model = [model, *extra], None
    bridges = parse_bridges(bridge or [])
    if media_folder is not None and not media_folder.is_dir():
        raise CommandError(f"--media-folder: {media_folder} is no folder", exit_code=2)
    quiet_libraries()
    from vlbridge.inference import model_source
    from vlbridge.serving.serving_requests import LIMITS_VARIABLE, Limits

    source = model_source(model)
    name = name or (Path(source).resolve().name if Path(source).is_dir() else source)
    limits = Limits(
        int(max_mebibytes * 2**20), int(max_megapixels * 1e6), max_images, max_characters, max_new_tokens, max_waiting,
        None if media_folder is None else str(media_folder), allow_urls, text_only,
    )  # fmt: skip
    with loading(source):
        chosen = choose_engine(engine, source, bridges, device)
    if chosen == "vllm":
        command = vllm_command(source, name, host, port, dtype, limits, extra)
        os.execve(command[0], command, {**os.environ, LIMITS_VARIABLE: limits.to_json()})
    if extra:
        raise CommandError(f"there is no argument {extra[0]!r} without vLLM", exit_code=2)
    device_and_dtype(device, dtype)
    try:
        from vlbridge.serving.serving_engine import Engine
        from vlbridge.serving.serving_server import run
    except ImportError as error:
        raise CommandError(f"{one_line(error)}: pip install 'vlbridge[serve]'") from error
    with loading(source):
        answering = Engine(source, bridges, name, device, dtype, limits, batch_size)
    print_line(f"http://{host}:{port}/v1 serves {', '.join(answering.names)}", sys.stderr)
    run(answering, host, port)


__all__ = ["serve"]
