"""Servers on this machine, in a thread of the test's process."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from contextlib import contextmanager

import uvicorn
from PIL import Image


@contextmanager
def listening(app):
    """Serve an ASGI app at a free port; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server does not start"
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)


def data_url(image: Image.Image, kind: str = "image/png") -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def asked(*parts) -> list[dict]:
    """A user's turn of texts and pictures, as OpenAI's clients write it."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
    return [{"role": "user", "content": content}]
