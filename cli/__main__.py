"""`python -m vlbridge_cli`: the command `vlbridge`."""

from .cli_app import app


if __name__ == "__main__":
    app()
