"""The page of `vlbridge app` as a folder that a Space of Hugging Face runs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement


PACKAGES = (
    "vlbridge", "vlbridge.assets", "vlbridge.configuration", "vlbridge.convert", "vlbridge.evaluation",
    "vlbridge.inspection", "vlbridge.model_cards", "vlbridge.modeling", "vlbridge.processing", "vlbridge.serving",
    "vlbridge.training",
)  # fmt: skip
APP = '''"""The page of vlbridge; the package lies beside this file."""

from vlbridge.app_page import serve_space


if __name__ == "__main__":
    serve_space({models!r})
'''
CARD = """---
title: vlbridge
colorFrom: gray
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
app_file: app.py
license: apache-2.0
suggested_hardware: cpu-basic
short_description: Show a picture, and ask about it
{models}---

# vlbridge

Show a picture, and ask about it. A small trained bridge joins a frozen vision encoder to a frozen language model.
Pictures are kept for an hour at most.
"""


def requirements() -> list[str]:
    """What the Space installs: what vlbridge requires, and what its embedded parts are converted with."""
    found = []
    for line in requires("vlbridge") or ():
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        if marker is None or marker.evaluate({"extra": "demo"}):
            found.append(str(requirement))
    return found


def write_space(folder: Path, models: Sequence[str | None]) -> list[Path]:
    """Write a Space: `app.py`, `requirements.txt`, `README.md` with the card, and the package itself.

    Args:
        folder: Where to write; it must be empty or missing.
        models: Ids on the Hub; `None` is the embedded bridge.

    Returns:
        The three files.

    Raises:
        ValueError: The folder is not empty, or a model is a folder of this machine.
        PackageNotFoundError: Gradio is not installed, whose version the card names.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    for model in models:
        if model is not None and (Path(model).exists() or model.startswith((".", "/", "~"))):
            raise ValueError(f"{model} is a folder here, which a Space can't reach; vlbridge push {model} NAME first")
    gradio = version("gradio")
    for name in PACKAGES:
        source = Path(find_spec(name).origin).parent  # found, not imported: some need extras
        shutil.copytree(source, folder.joinpath(*name.split(".")), dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    ids = [model for model in models if model is not None]
    named = "models:\n" + "".join(f"  - {model}\n" for model in ids) if ids else ""
    texts = {
        "app.py": APP.format(models=list(models)),
        "requirements.txt": "\n".join([*requirements(), ""]),
        "README.md": CARD.format(gradio=gradio, models=named),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


__all__ = ["write_space"]
