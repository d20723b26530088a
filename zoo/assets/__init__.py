"""Files that are shipped with the package: the default model's bridge and an example picture."""

from pathlib import Path


FOLDER = Path(__file__).parent


def default_model() -> str:
    """Folder of the shipped bridge: EfficientNet-Lite0 to SmolLM2-135M-Instruct, trained on easy-VQA."""
    return str(FOLDER / "easy_vqa_mlp")


def example_picture() -> str:
    """Path of a picture that the shipped bridge can describe."""
    return str(FOLDER / "example.png")
