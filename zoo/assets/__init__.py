"""Files that are shipped with the package: three bridges between the same parts, and two pictures."""

from pathlib import Path


FOLDER = Path(__file__).parent
EMBEDDED = "embedded"  # what the command line calls the first of them; the others are "embedded-qformer", ...
SHIPPED = ("mlp", "qformer", "perceiver")


def default_model(bridge: str = "mlp") -> str:
    """Folder of a shipped bridge from EfficientNet-Lite0 to SmolLM2-135M-Instruct.

    All were trained on the same drawings and photographs' feature maps, see `examples/three_bridges.py`.

    Args:
        bridge: `"mlp"`, `"qformer"` or `"perceiver"`.

    Raises:
        ValueError: There is no such bridge.
    """
    if bridge not in SHIPPED:
        raise ValueError(f"bridge is {bridge!r}; shipped are {', '.join(map(repr, SHIPPED))}.")
    return str(FOLDER / f"embedded_{bridge}")


def embedded_models() -> dict[str, str]:
    """Folders of the shipped bridges, by what the command line calls them: `embedded`, `embedded-qformer`, ..."""
    return {EMBEDDED: default_model(), **{f"{EMBEDDED}-{bridge}": default_model(bridge) for bridge in SHIPPED}}


def example_picture() -> str:
    """Path of a drawing that the shipped bridges can describe."""
    return str(FOLDER / "example.png")


def example_photograph() -> str:
    """Path of a photograph of a cat, by Stéfan van der Walt (public domain, CC0), scikit-image's `chelsea`."""
    return str(FOLDER / "photograph.jpg")
