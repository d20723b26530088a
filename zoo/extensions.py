"""What the installed package adds to saving and loading: model cards, uploads, code beside a model, places of frozen parts.

Configuration, processing and modeling lie below all of these and import none of them: they ask here. `import vlbridge`
registers what there is (`vlbridge.hub`, `vlbridge.demo`). A copy of the code that travels with a model has nothing
registered: it loads, runs and saves without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol


PUSH_OPTIONS = ("private", "token", "revision", "create_pr", "commit_message", "commit_description")


class Publisher(Protocol):
    """What happens around a saved model beyond writing its files."""

    def write_card(self, folder: Path, repo_id: str | None = None, tags: Iterable[str] = ()) -> None:
        """Write a model card into a saved model's folder that has none, or add tags to the card there."""

    def add_code(
        self,
        folder: Path,
        processor_class: type | None,
        model_class: type | None = None,
        config_class: type | None = None,
    ) -> None:
        """Put the code of a model and its processor, or of a processor alone, beside what is saved."""

    def upload(self, folder: Path, repo_id: str, **options: Any) -> Any:
        """Upload a folder in one commit; see `vlbridge.hub.push_folder`."""


_publishers: list[Publisher] = []
_locators: list[Callable[[str], str]] = []


def register_publisher(publisher: Publisher) -> None:
    """Have models and processors publish through `publisher`; the last one registered counts."""
    _publishers.append(publisher)


def register_locator(locate: Callable[[str], str]) -> None:
    """Add a function that says where to load a frozen part from: it takes a Hub id or folder and returns one."""
    if locate not in _locators:
        _locators.append(locate)


def publisher(what: str) -> Publisher:
    """The registered publisher.

    Args:
        what: What it is needed for, as the subject of the error message.

    Raises:
        ImportError: There is none: this is code that travels with a model.
    """
    if not _publishers:
        raise ImportError(f"{what} needs the package itself: pip install vlbridge, and import vlbridge.")
    return _publishers[-1]


def write_card(folder: Path, repo_id: str | None = None, tags: Iterable[str] = ()) -> None:
    """Write a model card where there is a publisher to write one."""
    if _publishers:
        _publishers[-1].write_card(folder, repo_id, tags)


def where_to_load(source: str) -> str:
    """The folder or Hub id to load a frozen part from; `source` itself unless a locator knows better."""
    for locate in _locators:
        source = locate(source)
    return source


def take_push_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove from `kwargs` what `Publisher.upload` takes, and return it."""
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
