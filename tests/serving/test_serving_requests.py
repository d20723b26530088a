"""Requests that are refused, each in words, and those that are read."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from chat_server import asked, data_url
from PIL import Image
from tiny import tiny_image

from vlbridge.serving import serving_requests
from vlbridge.serving.serving_requests import Limits, RequestError, limits_of_environment, read_request


LIMITS = Limits(max_pixels=10_000, max_images=3, max_characters=100, max_new_tokens=50)
PICTURE = data_url(tiny_image(1))


def with_picture(url, text="what is it?") -> dict:
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": content}]}


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def refused(fields, limits=LIMITS, status=400) -> str:
    with pytest.raises(RequestError) as error:
        read_request(fields if isinstance(fields, bytes) else json.dumps(fields).encode(), limits)
    assert error.value.status == status and str(error.value).endswith((".", ":")) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "said", "status"),
    [
        (b"{", "not JSON", 400),
        (b"[" * 100_000, "not JSON", 400),
        (b"[1]", "a JSON list; expected an object", 400),
        ({}, "messages is missing or empty", 400),
        ({"messages": ["hello"]}, r"messages[0] has no role", 400),
        ({"messages": [{"role": "robot", "content": "a"}]}, "expected an object with role", 400),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content is a int", 400),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "of type 'video'; expected 'text'", 400),
        ({"messages": [{"role": "user", "content": "a picture?"}]}, "There is no picture", 400),
        (with_picture("data:image/png;base64,!!!"), "not valid base64", 400),
        (with_picture("data:image/png,abc"), "without base64", 400),
        (with_picture(PICTURE.replace("image/png", "text/html")), "the type 'text/html'; expected image/png", 400),
        (with_picture("data:image/png;base64," + base64.b64encode(b"no picture").decode()), "not an image", 400),
        (with_picture(PICTURE[:-400]), "can't be read as a picture", 400),
        (with_picture(None), "has no address", 400),
        (with_picture("ftp://example.org/a.png"), "expected data:, file: or https:", 400),
        (with_picture(png(101, 100)), "101x100 pixels; this server takes at most 10000", 413),
        (with_picture(PICTURE, "a" * 101), "101 characters; this server takes at most 100", 413),
        ({"messages": asked("a", *[tiny_image(n) for n in range(4)])}, "more than 3 pictures", 400),
        ({**with_picture(PICTURE), "max_tokens": 51}, "max_tokens is 51; expected 1 to 50", 400),
        ({**with_picture(PICTURE), "max_tokens": True}, "max_tokens is a bool; expected int", 400),
        ({**with_picture(PICTURE), "temperature": "hot"}, "temperature is a str; expected int or float", 400),
        ({**with_picture(PICTURE), "stream": "yes"}, "stream is a str", 400),
        ({**with_picture(PICTURE), "n": 2}, "one answer per request", 400),
        ({**with_picture(PICTURE), "tools": [{}]}, "tools is not supported", 400),
        ({**with_picture(PICTURE), "stop": [""]}, "stop is not", 400),
        (with_picture("file:///etc/passwd"), "this server reads none", 400),
        (with_picture("https://example.org/a.png"), "this server fetches none", 400),
    ],
)
def test_bad_requests_are_refused_in_words(fields, said, status):
    assert said in refused(fields, status=status)


def test_a_picture_of_a_hundred_megapixels_is_not_decoded(monkeypatch):
    larger, large = png(20_000, 10_000), png(10_000, 10_000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    assert "too large" in refused(with_picture(larger), Limits(), 413)
    assert "10000x10000 pixels" in refused(with_picture(large), Limits(), 413)


def test_a_good_request_is_read():
    fields = {"messages": asked("first", tiny_image(1), "then"), "model": "m", "max_completion_tokens": 7}
    request = read_request(json.dumps(fields).encode(), LIMITS)
    (message,) = request.messages
    assert [part["type"] for part in message["content"]] == ["text", "image", "text"]
    assert message["content"][1]["image"].tobytes() == tiny_image(1).tobytes()
    assert (request.model, request.max_new_tokens, request.stream) == ("m", 7, False)
    assert request.options == {"do_sample": False}
    fields.update(temperature=0.5, stop="end", stream=True)
    request = read_request(json.dumps(fields).encode(), LIMITS)
    assert request.stream and request.options["temperature"] == 0.5 and request.options["stop_strings"] == ["end"]
    text = {"messages": [{"role": "user", "content": "no picture"}]}
    assert read_request(json.dumps(text).encode(), Limits(text_only=True)).messages[0]["content"][0]["type"] == "text"


def test_files_of_one_folder_alone(tmp_path):
    inside, outside = tmp_path / "pictures" / "a b.png", tmp_path / "secret.png"
    inside.parent.mkdir()
    for file in (inside, outside):
        tiny_image(2).save(file)
    (inside.parent / "link.png").symlink_to(outside)
    limits = Limits(media_folder=str(inside.parent))
    found = read_request(json.dumps(with_picture(inside.as_uri())).encode(), limits)
    assert found.messages[0]["content"][1]["image"].tobytes() == tiny_image(2).tobytes()
    for url in (outside.as_uri(), f"file://{inside.parent}/../secret.png", f"file://{inside.parent}/link.png",
                f"file://{inside.parent}/%2e%2e/secret.png", f"file://elsewhere{inside}"):  # fmt: skip
        assert "outside the folder" in refused(with_picture(url), limits)
    assert "no such file" in refused(with_picture((inside.parent / "none.png").as_uri()), limits)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "10.0.0.7", "192.168.1.1", "169.254.169.254", "[::1]", "0.0.0.0", "2130706433"]
)
def test_private_addresses_are_never_asked(host, monkeypatch):
    monkeypatch.setattr(serving_requests.socket, "create_connection", lambda *a, **k: pytest.fail("it was asked"))
    said = refused(with_picture(f"http://{host}/a.png"), Limits(fetch=True))
    assert "not a public address" in said or "can't be found" in said


@pytest.fixture
def web(monkeypatch):
    """A server on this machine that is taken for a public one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            moved = self.path == "/moved"
            self.send_response(302 if moved else 200)
            if moved:
                self.send_header("Location", "http://127.0.0.1/a.png")
            self.end_headers()
            self.wfile.write(b"" if moved else base64.b64decode(PICTURE.partition(",")[2]))

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(serving_requests, "public_addresses", lambda host, where: ["127.0.0.1"])
    yield f"http://example.org:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_pictures_are_fetched_where_that_is_allowed(web):
    fields = with_picture(f"{web}/a.png")
    found = read_request(json.dumps(fields).encode(), Limits(fetch=True))
    assert found.messages[0]["content"][1]["image"].tobytes() == tiny_image(1).tobytes()
    assert "answers 302" in refused(with_picture(f"{web}/moved"), Limits(fetch=True))
    assert "more than 100 bytes" in refused(with_picture(f"{web}/a.png"), Limits(fetch=True, max_bytes=100), 413)


def test_limits_reach_another_process(monkeypatch):
    assert limits_of_environment() == Limits()
    monkeypatch.setenv(serving_requests.LIMITS_VARIABLE, LIMITS.to_json())
    assert limits_of_environment() == LIMITS
