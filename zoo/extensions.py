"""Extension points of saving and loading: model cards, uploads, code beside a model, sources of frozen parts.

Configuration, processing and modeling are lower layers and do not import these; they call the functions of this module.
`import vlbridge` registers the implementations (`vlbridge.hub`, `vlbridge.demo`). Code that is saved along with a model
has none registered; it can load, run and save models without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol


PUSH_OPTIONS = ("private", "token", "revision", "create_pr", "commit_message", "commit_description")


class Publisher(Protocol):
    """Writes model cards, saves code beside a model, and uploads folders."""

    def write_card(self, folder: Path, repo_id: str | None = None, tags: Iterable[str] = ()) -> None:
        """Write a model card into a saved model's folder if it has none, or add tags to its card."""

    def add_code(
        self,
        folder: Path,
        processor_class: type | None,
        model_class: type | None = None,
        config_class: type | None = None,
    ) -> None:
        """Save the code of a model and its processor, or of a processor alone, into the folder."""

    def upload(self, folder: Path, repo_id: str, **options: Any) -> Any:
        """Upload a folder in one commit; see `vlbridge.hub.push_folder`."""


_publishers: list[Publisher] = []
_locators: list[Callable[[str], str]] = []


def register_publisher(publisher: Publisher) -> None:
    """Let models and processors publish through `publisher`, which replaces an earlier one."""
    _publishers.append(publisher)


def register_locator(locate: Callable[[str], str]) -> None:
    """Add a function that maps a frozen part's Hub id or folder to the Hub id or folder to load it from."""
    if locate not in _locators:
        _locators.append(locate)


def publisher(what: str) -> Publisher:
    """The registered publisher.

    Args:
        what: The feature that needs it, as the subject of the error message.

    Raises:
        ImportError: None is registered: the code runs from a model's folder, without the package.
    """
    if not _publishers:
        raise ImportError(f"{what} needs the package itself: pip install vlbridge, and import vlbridge.")
    return _publishers[-1]


def write_card(folder: Path, repo_id: str | None = None, tags: Iterable[str] = ()) -> None:
    """Write a model card, if a publisher is registered."""
    if _publishers:
        _publishers[-1].write_card(folder, repo_id, tags)


def where_to_load(source: str) -> str:
    """The folder or Hub id to load a frozen part from; `source` itself unless a locator replaces it."""
    for locate in _locators:
        source = locate(source)
    return source


def take_push_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of `Publisher.upload` from `kwargs`, and return them."""
    return {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}


__all__ = [
    "Publisher",
    "publisher",
    "register_locator",
    "register_publisher",
    "take_push_options",
    "where_to_load",
    "write_card",
]
