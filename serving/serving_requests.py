"""Chat requests as OpenAI's API has them: checked before a model sees them, with errors in words.

Source: OpenAI's API reference, "Create chat completion".
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import json
import os
import socket
import ssl
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from ..images import ImageError, decode_image, load_image


FETCH_SECONDS = 10  # for each step of fetching a picture


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Args:
        max_bytes: Longest request, in bytes; pictures in it are a third longer than their files.
        max_pixels: Largest picture, width times height.
        max_images: Most pictures of a request.
        max_characters: Longest text of a request, all turns together.
        max_new_tokens: Longest answer, in tokens.
        max_waiting: Most requests that wait for their turn.
        media_folder: Folder whose files requests may name as `file://...`; `None` for none.
        fetch: Whether requests may name pictures by http(s) addresses. Private addresses are never asked.
        text_only: Whether requests may have no picture.
        max_seconds: Longest time that an answer is worked on, in seconds: it ends at the next token. `None` for any.
    """

    max_bytes: int = 32 << 20
    max_pixels: int = 40_000_000
    max_images: int = 8
    max_characters: int = 32_768
    max_new_tokens: int = 1024
    max_waiting: int = 128
    media_folder: str | None = None
    fetch: bool = False
    text_only: bool = False
    max_seconds: float | None = None

    def to_json(self) -> str:
        """As JSON, for another process."""
        return json.dumps(asdict(self))


class RequestError(ValueError):
    """A request that can't be answered as it is.

    Args:
        message: What was found, what was expected, and what to do.
        status: HTTP status, 400 to 499; 429 and 503 if the request may be repeated.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass
class ChatRequest:
    """A request that was checked.

    Args:
        model: Name of the model as the client wrote it, or `None`.
        messages: The conversation as processors take it; its images are RGB pictures.
        max_new_tokens: Longest answer, in tokens.
        stream: Whether the answer is sent as a stream of events.
        options: Arguments of `generate`.
    """

    model: str | None
    messages: list[dict]
    max_new_tokens: int
    stream: bool = False
    options: dict = field(default_factory=dict)


def read_request(body: bytes, limits: Limits, default_tokens: int = 256) -> ChatRequest:
    """Check a chat request and read its pictures.

    Args:
        body: The request's JSON.
        limits: What it may ask for.
        default_tokens: Longest answer if the request does not say, in tokens.

    Raises:
        RequestError: Something is missing, has another type, or is beyond the limits.
    """
    fields = parsed(body)
    messages = read_messages(fields, limits)
    return ChatRequest(
        _of_type(fields, "model", str, None),
        messages,
        new_tokens(fields, limits, default_tokens),
        _of_type(fields, "stream", bool, False),
        _options(fields),
    )


def read_messages(fields: dict, limits: Limits) -> list[dict]:
    """Check a request's conversation and read its pictures.

    Args:
        fields: The request. Fetched pictures are put into it in place of their addresses.
        limits: What it may ask for.

    Returns:
        The conversation as processors take it, with RGB pictures.

    Raises:
        RequestError: Something is missing, has another type, or is beyond the limits.
    """
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is missing or empty; expected a list of {'role', 'content'}.")
    reader = _PictureReader(limits)
    read = [_message(message, number, reader) for number, message in enumerate(messages)]
    texts = [part["text"] for message in read for part in message["content"] if part["type"] == "text"]
    check_characters(texts, limits)
    if not reader.count and not limits.text_only:
        raise RequestError("There is no picture: add {'type': 'image_url', 'image_url': {'url': 'data:...'}}.")
    if not any(text.strip() for text in texts) and not reader.count:
        raise RequestError("The conversation has neither text nor a picture.")
    return read


def check_characters(texts: Iterable[str], limits: Limits) -> None:
    """Refuse conversations that are too long before they are tokenised.

    Args:
        texts: All texts of a conversation.
        limits: What it may have.

    Raises:
        RequestError: It is too long.
    """
    if (length := sum(map(len, texts))) > limits.max_characters:
        raise RequestError(
            f"The conversation has {length} characters; this server takes at most {limits.max_characters}.", 413
        )


def check_pixels(file: io.BytesIO | Path, where: str, limits: Limits) -> None:
    """Refuse pictures that are too large by their header, before they are decoded.

    Args:
        file: The picture's file. One that can't be read passes: decoding says what is wrong with it.
        where: What the message calls it.
        limits: What it may have.

    Raises:
        RequestError: It has too many pixels.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{where} is too large: {error}", 413) from error
    except Exception:
        return
    if width * height > limits.max_pixels:
        raise RequestError(
            f"{where} has {width}x{height} pixels; this server takes at most {limits.max_pixels}. Make it smaller: the "
            "model scales it down anyway.", 413
        )  # fmt: skip


def refused(error: BaseException) -> str | None:
    """What a model's error tells the person who asked; `None` if it is not about the request.

    Args:
        error: What the model raised.
    """
    return f"The model refuses this request: {error}" if isinstance(error, ValueError) else None


FAILED = "The model failed."


def parsed(body: bytes) -> dict:
    """The fields of a request.

    Raises:
        RequestError: It is not a JSON object.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise RequestError(f"The request is a JSON {type(fields).__name__}; expected an object with 'messages'.")
    return fields


def _of_type(fields: dict, name: str, kind, default, least=None, most=None):
    """A field of a request; numbers are between `least` and `most`."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise RequestError(f"{name} is a {type(value).__name__}; expected {expected}.")
    if least is not None and not least <= value <= most:
        raise RequestError(f"{name} is {value}; expected {least} to {most}.")
    return value


def new_tokens(fields: dict, limits: Limits, default_tokens: int) -> int:
    """Longest answer that a request asks for, in tokens.

    Raises:
        RequestError: It is no number from 1 to the limit.
    """
    name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    return _of_type(fields, name, int, min(default_tokens, limits.max_new_tokens), 1, limits.max_new_tokens)


def _options(fields: dict) -> dict:
    """Arguments of `generate`; fields that would be ignored are refused."""
    if _of_type(fields, "n", int, 1) != 1:
        raise RequestError(f"n is {fields['n']}; this server gives one answer per request.")
    for name in ("tools", "functions", "response_format", "logit_bias", "audio"):
        if fields.get(name):
            raise RequestError(f"{name} is not supported by this server; leave it out.")
    for name in ("frequency_penalty", "presence_penalty", "logprobs"):
        if fields.get(name):
            raise RequestError(f"{name} is {fields[name]!r}; this server has no such setting, leave it out.")
    options: dict = {"do_sample": False}
    temperature = _of_type(fields, "temperature", (int, float), 0, 0, 10)
    if temperature > 0:
        top_p = _of_type(fields, "top_p", (int, float), 1.0, 1e-6, 1)
        options = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": 0}
    stop = fields.get("stop")
    if stop is not None:
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(text, str) and text for text in stop):
            raise RequestError("stop is not a text or a list of up to four texts.")
        options["stop_strings"] = stop
    return options


def _message(message, number: int, reader: _PictureReader) -> dict:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise RequestError(f"{where} has no role; expected an object with role 'system', 'user' or 'assistant'.")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RequestError(f"{where}.content is a {type(content).__name__}; expected a text or a list of parts.")
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image_url":
            parts.append({"type": "image", "image": reader.read(part, f"{where}.content[{index}]")})
        else:
            raise RequestError(f"{where}.content[{index}] is of type {kind!r}; expected 'text' or 'image_url'.")
    return {"role": message["role"], "content": parts}


class _PictureReader:
    """Reads the pictures of one request.

    Args:
        limits: What it may ask for.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.count = 0

    def read(self, part: dict, where: str) -> Image.Image:
        """The picture that a part of a message names, in mode `"RGB"`.

        Raises:
            RequestError: There is none that this server may or can read.
        """
        self.count += 1
        if self.count > self.limits.max_images:
            raise RequestError(f"There are more than {self.limits.max_images} pictures, the most this server takes.")
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str) or not url:
            raise RequestError(f"{where} has no address; expected image_url: {{'url': 'data:image/png;base64,...'}}.")
        try:
            if url.startswith("data:"):
                data = self.decoded(url, where)
                check_pixels(io.BytesIO(data), where, self.limits)
                return decode_image(data, where)
            if url.startswith("file:"):
                path = self.allowed_file(url, where)
                check_pixels(path, where, self.limits)
                return load_image(path)
            if url.startswith(("http://", "https://")):
                data = self.fetched(url, where)
                part["image_url"] = {"url": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"}
                check_pixels(io.BytesIO(data), where, self.limits)
                return decode_image(data, where)
        except ImageError as error:
            raise RequestError(f"{where} can't be read as a picture: {error.reason}.") from error
        raise RequestError(f"{where} has an address that begins with {url[:12]!r}; expected data:, file: or https:.")

    @staticmethod
    def decoded(url: str, where: str) -> bytes:
        """The bytes of a data URL."""
        head, comma, text = url.partition(",")
        kind, *settings = head.removeprefix("data:").split(";")
        if not comma or "base64" not in settings:
            raise RequestError(f"{where} is a data URL without base64; expected data:image/png;base64,....")
        if not kind.startswith("image/"):
            raise RequestError(f"{where} has the type {kind[:40]!r}; expected image/png, image/jpeg or the like.")
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"{where} is not valid base64: {error}.") from error

    def allowed_file(self, url: str, where: str) -> Path:
        """The file that a request names, if it lies in the folder that requests may read."""
        if self.limits.media_folder is None:
            raise RequestError(f"{where} names a file; this server reads none. Send the picture as a data URL.")
        root = Path(self.limits.media_folder).resolve()
        parts = urlsplit(url)
        path = Path(unquote(parts.path)).resolve()  # links lead to where they point
        if parts.netloc not in ("", "localhost") or not path.is_relative_to(root):
            raise RequestError(f"{where} names a file outside the folder that this server may read.")
        return path

    def fetched(self, url: str, where: str) -> bytes:
        """What is at a public address; redirections are not followed."""
        if not self.limits.fetch:
            raise RequestError(f"{where} names an address; this server fetches none. Send the picture as a data URL.")
        return fetch(url, where, self.limits.max_bytes)


def public_addresses(host: str | None, where: str) -> list[str]:
    """The addresses that a name stands for, if all of them are public.

    Args:
        host: Name or address.
        where: The place in the request, for the message.

    Raises:
        RequestError: One of them is of this machine or of a private network, or there is no such name.
    """
    try:
        found = [entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)] if host else []
    except (OSError, UnicodeError) as error:
        raise RequestError(f"{where} names {host!r}, which can't be found.") from error
    if not found or not all(ipaddress.ip_address(address.split("%")[0]).is_global for address in found):
        raise RequestError(f"{where} names {host!r}, which is not a public address.")
    return found


def fetch(url: str, where: str, max_bytes: int) -> bytes:
    """Read what is at a public address, which is looked up once: a second answer could be a private one.

    Args:
        url: An http(s) address.
        where: The place in the request, for messages.
        max_bytes: Most bytes that are read.

    Raises:
        RequestError: It is not public, does not answer with a picture, or is too large.
    """
    try:
        parts = urlsplit(url)
        secure, port = parts.scheme == "https", parts.port
    except ValueError as error:
        raise RequestError(f"{where} is not an address: {error}.") from error
    address = public_addresses(parts.hostname, where)[0]
    port = port or (443 if secure else 80)
    connection = http.client.HTTPConnection(parts.hostname, port)
    try:
        connection.sock = socket.create_connection((address, port), timeout=FETCH_SECONDS)
        if secure:
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=parts.hostname)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"User-Agent": "vlbridge"})
        answer = connection.getresponse()
        data = answer.read(max_bytes + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RequestError(f"{where} can't be fetched: {error}.") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise RequestError(f"{where} can't be fetched: {parts.hostname} answers {answer.status} {answer.reason}.")
    if len(data) > max_bytes:
        raise RequestError(f"{where} has more than {max_bytes} bytes.", 413)
    return data


def limits_from_json(text: str | None) -> Limits:
    """Limits as `Limits.to_json` wrote them; the defaults for `None`."""
    return Limits(**json.loads(text)) if text else Limits()


LIMITS_VARIABLE = "VLBRIDGE_SERVE_LIMITS"  # tells the middleware in vLLM's process


def limits_of_environment() -> Limits:
    """The limits that `vlbridge serve` has set for this process."""
    return limits_from_json(os.environ.get(LIMITS_VARIABLE))


__all__ = [
    "FAILED",
    "LIMITS_VARIABLE",
    "ChatRequest",
    "Limits",
    "RequestError",
    "check_characters",
    "check_pixels",
    "fetch",
    "limits_of_environment",
    "new_tokens",
    "parsed",
    "read_messages",
    "read_request",
    "refused",
]
