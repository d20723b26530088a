"""Questions per second of `vlbridge serve` and of `generate`, and a load test that pairs every answer with its picture.

    python benchmarks/serving.py speed --model FOLDER --output benchmarks/results/serving.json
    python benchmarks/serving.py load --model FOLDER --seconds 300 --clients 64

`speed` asks the same questions through vLLM with our plugin (if it is installed), through our engine (`vlbridge serve
--engine transformers`), through `transformers serve` after `import vlbridge`, and with one call of `generate` for all
questions. Without `--model` it takes the embedded bridge. Answers are compared with those of `generate`.

`load` starts `vlbridge serve` and asks with many clients at once, who also send bad requests and leave early. It ends
with an error if a single answer belongs to another picture.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from vlbridge.inference import generate_texts, load, model_source, question_inputs


QUESTION = "what color is the shape?"
START = "import vlbridge, sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"


def picture(number: int) -> Image.Image:
    """A shape whose colour, kind and place follow from its number."""
    draw_random = random.Random(number)
    image = Image.new("RGB", (64, 64), tuple(draw_random.randrange(200, 256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    left, top = draw_random.randrange(4, 24), draw_random.randrange(4, 24)
    shape = draw.ellipse if number % 2 else draw.rectangle
    shape((left, top, left + 32, top + 32), fill=tuple(draw_random.randrange(0, 200) for _ in range(3)))
    return image


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def body(model: str, url: str, tokens: int) -> dict:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    fields = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens}
    return {**fields, "temperature": 0}


def ask(address: str, fields: dict, timeout: float = 600) -> tuple[int, str]:
    """Status and answer, or what the server says of the request."""
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(fields).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, json.load(answer)["choices"][0]["message"]["content"].strip()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@contextmanager
def running(command: list[str], more: list[str], patience: float = 1800):
    """Start a server with `more` arguments after its port; gives its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([*command, "--port", str(port), *more], stdout=sys.stderr)
    try:
        deadline = time.monotonic() + patience
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command[:4])} ... does not start")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address, process
    finally:
        process.terminate()
        process.wait(timeout=60)


def server_of(engine: str, source: str) -> list[str]:
    if engine == "transformers serve":
        return [sys.executable, "-c", START, "serve", source, "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-m", "vlbridge_cli", "serve", source, "--name", "model", "--dtype", "float32"]
    return [*command, "--engine", "vllm" if engine == "vllm" else "transformers"]


def vllm_options(engine: str, arguments: argparse.Namespace) -> list[str]:
    return ["--", *arguments.vllm_options.split()] if engine == "vllm" else []


def through_server(engine: str, source: str, urls: list[str], arguments: argparse.Namespace) -> dict:
    tokens, clients = arguments.tokens, arguments.clients
    already = dict(option.split("=", 1) for option in arguments.running).get(engine)
    server = nullcontext((already, None)) if already else running(
        server_of(engine, source), vllm_options(engine, arguments)
    )  # fmt: skip
    with server as (address, _):
        name = source if engine == "transformers serve" else "model"
        ask(address, body(name, urls[0], 2))  # loads what is loaded late
        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(lambda url: ask(address, body(name, url, tokens)), urls))
        seconds = time.perf_counter() - began
    if wrong := [text for status, text in found if status != 200]:
        raise RuntimeError(f"{engine}: {wrong[0]}")
    return {"seconds": round(seconds, 2), "questions_per_second": round(len(urls) / seconds, 3),
            "answers": [text for _, text in found]}  # fmt: skip


def with_generate(source: str, images: list[Image.Image], tokens: int, batch: int) -> dict:
    model, processor = load(source, "cpu")
    generate_texts(model, processor, question_inputs(processor, images[:1], QUESTION), max_new_tokens=2)
    began, answers = time.perf_counter(), []
    for start in range(0, len(images), batch):
        inputs = question_inputs(processor, images[start : start + batch], QUESTION)
        answers += generate_texts(model, processor, inputs, max_new_tokens=tokens)
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 2), "questions_per_second": round(len(images) / seconds, 3), "answers": answers}


def speed(arguments: argparse.Namespace) -> None:
    source = model_source(arguments.model)
    images = [picture(arguments.first + number) for number in range(arguments.questions)]
    urls = [data_url(image) for image in images]
    result = {"generate": with_generate(source, images, arguments.tokens, arguments.questions)}
    for engine in arguments.engines:
        result[engine] = through_server(engine, source, urls, arguments)
    expected = result["generate"]["answers"]
    for found in result.values():
        found["equal_answers"] = sum(map(str.__eq__, found.pop("answers"), expected))
    about = {"questions": len(images), "new_tokens": arguments.tokens, "clients": arguments.clients, "dtype": "float32",
             "model": arguments.name, "cpus": os.cpu_count(), "load_average_at_end": round(os.getloadavg()[0], 1),
             "torch": torch.__version__}  # fmt: skip
    text = json.dumps({**about, "results": result}, indent=2)
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")


def resident(process: subprocess.Popen) -> int:
    """Resident memory of a process, in MiB; Linux only."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) >> 10
    return 0


def large_png() -> str:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def bad_requests(url: str) -> list[dict]:
    """Bad base64, a wrong type, 100 megapixels, no picture, 50 pictures, a huge prompt."""
    changed = [body("model", found, 4) for found in (
        "data:image/png;base64,###", url.replace("image/png", "text/plain"), large_png()
    )]  # fmt: skip
    text = body("model", url, 4)
    text["messages"][0]["content"] = "no picture"
    many = body("model", url, 4)
    many["messages"][0]["content"] *= 50
    huge = body("model", url, 4)
    huge["messages"][0]["content"][1]["text"] = "w" * 100_000
    return [*changed, text, many, huge]


def leave(address: str, fields: dict) -> None:
    """Ask and go away before the answer."""
    try:
        ask(address, fields, timeout=0.2)
    except OSError:
        pass


def load_test(arguments: argparse.Namespace) -> None:
    source = model_source(arguments.model)
    images = [picture(number) for number in range(arguments.pictures)]
    urls = [data_url(image) for image in images]
    model, processor = load(source, "cpu")
    inputs = question_inputs(processor, images, QUESTION)
    expected = generate_texts(model, processor, inputs, max_new_tokens=arguments.tokens)
    del model
    bad = bad_requests(urls[0])
    counts: Counter[str] = Counter()
    lock = threading.Lock()
    end = [0.0]

    def client(number: int) -> None:
        choose = random.Random(number)
        while time.monotonic() < end[0]:
            kind, which = choose.random(), choose.randrange(len(images))
            if kind < 0.1:
                status, text = ask(address, choose.choice(bad))
                outcome = "refused with 4xx" if 400 <= status < 500 and "message" in text else f"bad gave {status}"
            elif kind < 0.2:
                leave(address, body("model", urls[which], 200))
                outcome = "left early"
            else:
                status, text = ask(address, body("model", urls[which], arguments.tokens))
                outcome = "right" if status == 200 and text == expected[which] else f"wrong ({status})"
            with lock:
                counts[outcome] += 1

    with running(server_of(arguments.engine, source), vllm_options(arguments.engine, arguments)) as (address, process):
        for number in range(len(images)):
            ask(address, body("model", urls[number], arguments.tokens))
        before = resident(process)
        end[0] = time.monotonic() + arguments.seconds
        with ThreadPoolExecutor(arguments.clients) as pool:
            list(pool.map(client, range(arguments.clients)))
        after = resident(process)
        status, text = ask(address, body("model", urls[0], arguments.tokens))
        assert (status, text) == (200, expected[0])
    result = {"seconds": arguments.seconds, "clients": arguments.clients, "different_answers": len(set(expected)),
              "memory_mib": {"start": before, "end": after}, "requests": dict(counts)}  # fmt: skip
    print(json.dumps(result, indent=2))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")
    if any(outcome.startswith(("wrong", "bad gave")) for outcome in counts):
        raise SystemExit("some answers are wrong")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("speed", speed), ("load", load_test)):
        command = commands.add_parser(name)
        command.set_defaults(run=function)
        command.add_argument("--model", help="Folder or Hub id; the embedded bridge by default.")
        command.add_argument("--output", help="JSON file to write.")
        command.add_argument("--tokens", type=int, default=24, help="New tokens per answer.")
        command.add_argument("--clients", type=int, default=64 if name == "load" else 32)
        command.add_argument("--vllm-options", default="--enforce-eager --max-model-len 1024", help="For `vllm serve`.")
    speed_command, load_command = commands.choices["speed"], commands.choices["load"]
    speed_command.add_argument("--questions", type=int, default=32)
    speed_command.add_argument("--first", type=int, default=0, help="First picture: servers keep those they have seen.")
    speed_command.add_argument("--name", default="the embedded bridge", help="What the result calls the model.")
    speed_command.add_argument("--engines", nargs="+", default=["vllm", "transformers", "transformers serve"])
    speed_command.add_argument(
        "--running", action="append", default=[], metavar="ENGINE=ADDRESS", help="A server that runs already."
    )
    load_command.add_argument("--seconds", type=float, default=300)
    load_command.add_argument("--pictures", type=int, default=16)
    load_command.add_argument("--engine", default="transformers", choices=["vllm", "transformers"])
    given = parser.parse_args()
    given.run(given)
