"""Records in memory, as data sets give them, and comparison of training on their batches."""

from __future__ import annotations

import io

import torch
from tiny import tiny_image


IMAGE, TEXT = {"type": "image", "text": None}, lambda text: {"type": "text", "text": text}


def image(seed: int = 0, size: tuple[int, int] = (40, 33)) -> dict:
    buffer = io.BytesIO()
    tiny_image(seed, size).save(buffer, "PNG")
    return {"path": None, "bytes": buffer.getvalue()}


def caption(text: str = "two dogs", seed: int = 0) -> dict:
    return {"id": f"c{seed}", "source": "captions", "images": [image(seed)], "caption": text}


def talk(*texts: str, seed: int = 0) -> dict:
    content = [[IMAGE, TEXT(texts[0])], *([TEXT(text)] for text in texts[1:])]
    roles = ["user", "assistant"] * (len(texts) // 2)
    messages = [{"role": role, "content": part} for role, part in zip(roles, content)]
    return {"id": f"t{seed}", "source": "talks", "images": [image(seed)], "messages": messages}


def document(*parts: str | int) -> dict:
    items = [IMAGE if isinstance(part, int) else TEXT(part) for part in parts]
    images = [image(part) for part in parts if isinstance(part, int)]
    return {"id": "d", "source": "documents", "images": images, "document": items}


def loss_and_gradients(model, inputs: dict, **more) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch, and the gradients of all that the bridge has."""
    model.zero_grad()
    loss = model(**inputs, **more).loss
    loss.backward()
    names = [(name, parameter) for name, parameter in model.bridge.named_parameters() if parameter.grad is not None]
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in names}


def assert_same(one, other) -> None:
    """Of `loss_and_gradients`, in float32: rows of other lengths and other batches add up in another order."""
    torch.testing.assert_close(one[0], other[0], atol=2e-6, rtol=2e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        scale = float(other[1][name].abs().max())
        torch.testing.assert_close(gradient, other[1][name], atol=2e-5 * max(scale, 1e-3), rtol=1e-4, msg=name)
