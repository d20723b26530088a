"""`python -m vlbridge.cli`: the command `vlbridge`, which is in `vlbridge_cli`."""

from vlbridge_cli.cli_app import app


def __getattr__(name: str):
    """`answer` and `load`, which are in `vlbridge.inference` now."""
    if name in ("answer", "load"):
        from . import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["app"]


if __name__ == "__main__":
    app()
