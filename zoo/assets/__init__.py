"""Files that are shipped with the package: trained bridges and two example pictures."""

from pathlib import Path


FOLDER = Path(__file__).parent
EMBEDDED = "embedded"  # what the command line calls the first of them; each is also "embedded-mlp", ... by its family
SHIPPED = {"mlp": "embedded_mlp", "qformer": "embedded_qformer"}  # family and folder


def default_model(bridge: str = "mlp") -> str:
    """Folder of a shipped bridge from EfficientNet-Lite0 to SmolLM2-135M-Instruct.

    Args:
        bridge: Its family; `"mlp"` and `"qformer"` are shipped.

    Raises:
        ValueError: There is no such bridge.
    """
    if bridge not in SHIPPED:
        raise ValueError(f"bridge is {bridge!r}; shipped are {', '.join(map(repr, SHIPPED))}.")
    return str(FOLDER / SHIPPED[bridge])


def embedded_models() -> dict[str, str]:
    """Folders of the shipped bridges, by what the command line calls them: `embedded`, `embedded-mlp`, ..."""
    return {EMBEDDED: default_model(), **{f"{EMBEDDED}-{bridge}": default_model(bridge) for bridge in SHIPPED}}


def example_picture() -> str:
    """Path of a drawing that the shipped bridges can describe."""
    return str(FOLDER / "example.png")


def example_photograph() -> str:
    """Path of a photograph that the shipped MLP can name: a cup of coffee, from scikit-image's samples (CC0)."""
    return str(FOLDER / "photograph.jpg")
