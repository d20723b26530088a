"""Uploads to the Hub in one commit, with a model card and optionally with the code."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig

from . import extensions
from .demo import EMBEDDED
from .families import class_named
from .files import read_json, replacing, retried, sha256_of, write_json
from .modeling.modeling_pins import WEIGHTS, accepted_hashes, commit_of, weights_sha256
from .remote_code import add_code, auto_map_of


# Not part of a model: folders that huggingface_hub's own uploads ignore too, and a training run's checkpoints
IGNORED = re.compile(r"(.*/)?(\.git|\.cache|__pycache__)/.*|checkpoint-\d+/.*")


def _pins_of(folder: Path) -> dict[str, dict]:
    """Pins of a bridge that is saved alone; nothing for other folders."""
    config = read_json(folder / "config.json", {})
    return (config.get("frozen_parts") or {}) if config.get("bridge_only") else {}


def check_pins(pins: dict[str, dict]) -> None:
    """Refuse to publish a bridge whose frozen parts lie in folders of this machine.

    Args:
        pins: The configuration's `frozen_parts`.

    Raises:
        ValueError: Nobody else could load the bridge.
    """
    for part, pin in pins.items():
        source = str(pin.get("source"))
        if os.path.isabs(source) or os.path.isdir(source):
            raise ValueError(
                f"the bridge's {part} is {source!r}, a folder of this machine: nobody else could load the bridge. Name "
                f"a Hub repository with the same weights (vlbridge push --part {part}=OWNER/NAME, or "
                f"model.set_frozen_parts({part}='OWNER/NAME') before saving), or upload the whole model."
            )


def _name_parts(folder: Path, parts: dict[str, str]) -> None:
    """Write into a saved bridge where its frozen parts are on the Hub.

    Raises:
        ValueError: A part is unknown, or its weights are not those that the bridge was trained with.
        OSError: They can't be loaded.
    """
    pins = _pins_of(folder)
    for part, source in parts.items():
        if part not in pins:
            raise ValueError(f"there is no part {part!r} to name; the model has {', '.join(pins) or 'all its parts'}.")
        if (found := weights_sha256(source)) not in (accepted := accepted_hashes(pins[part])):
            raise ValueError(
                f"{source!r} does not hold the weights of the {part}: they hash to {found}, expected "
                f"{' or '.join(sorted(accepted)) or 'a pinned hash, but this bridge has none'}."
            )
        pins[part] |= {"source": source, "revision": commit_of(source), "sha256": found}
    if parts:
        path = folder / "config.json"
        write_json(path, {**read_json(path), "frozen_parts": pins})


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    keep: Iterable[str] = (),
) -> CommitInfo:
    """Upload a folder in one commit.

    Args:
        folder: A saved model, or some of its files; checkpoints of its training are left out. Files of the repository
            that are not in the folder are kept, except old weights, which are deleted if the folder has weights.
        repo_id: `name` or `owner/name`; the repository is created if it does not exist.
        private: Whether a new repository is private; `None` follows the account's settings.
        token: Hub token; `None` takes the saved one.
        revision: Branch to commit to, created if it does not exist; `None` takes the main branch.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: First line of the commit's message.
        commit_description: Body of the commit's message.
        keep: Names of files that are not replaced if the repository has them.

    Returns:
        The commit; `.oid` is its hash.

    Raises:
        ValueError: The folder has no files, or a bridge that nobody else could load.
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses the upload, or fails at every attempt.
    """
    folder = Path(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths = {name: path for name, path in paths.items() if not IGNORED.fullmatch(name)}
    if not paths:
        raise ValueError(f"There are no files in {folder}; expected the folder of a saved model.")
    check_pins(_pins_of(folder))
    api = HfApi(library_name="vlbridge", token=token)
    repo_id = retried(api.create_repo, repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        retried(api.create_branch, repo_id, branch=revision, exist_ok=True)
    for name in keep:
        if name in paths and retried(api.file_exists, repo_id, name, revision=revision):
            del paths[name]

    # Not upload_folder, which makes several commits since huggingface_hub 2
    def commit() -> CommitInfo:
        # Each attempt has new operations, so that the client notices what an earlier attempt has uploaded.
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in paths.items()
        ]
        if any(map(WEIGHTS.fullmatch, paths)):
            known = api.list_repo_files(repo_id, revision=revision)
            stale = [name for name in known if WEIGHTS.fullmatch(name) and name not in paths]
            operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        return api.create_commit(
            repo_id, operations, commit_message=commit_message or f"Upload {len(paths)} files",
            commit_description=commit_description, revision=revision, create_pr=create_pr,
        )  # fmt: skip

    return retried(commit)


class PublishedError(ValueError):
    """Something was uploaded, but nobody could load it."""


def check_published(folder: Path, commit: CommitInfo, token: str | bool | None = None) -> None:
    """Load what was uploaded as someone else would: from the Hub, with an empty cache.

    The configuration is read, a bridge's weights are downloaded and compared (of a whole model, which may have many
    gigabytes, the Hub's hashes), and the places of the frozen parts are asked for.

    Args:
        folder: What was uploaded.
        commit: The commit.
        token: Hub token.

    Raises:
        PublishedError: It can't be loaded from there: what is wrong, and what to do.
    """
    api, repo_id, pins = HfApi(library_name="vlbridge", token=token), commit.repo_url.repo_id, _pins_of(folder)
    weights = [path.name for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"]
    where = f"{repo_id} was uploaded ({commit.commit_url}), but"
    with tempfile.TemporaryDirectory() as cache:
        try:
            for name in ["config.json", *(weights if pins else ())]:
                found = retried(api.hf_hub_download, repo_id, name, revision=commit.oid, cache_dir=cache)
                if sha256_of(found) != sha256_of(folder / name):
                    raise PublishedError(f"{where} {name} there is not what was sent. Push it again.")
                if name == "config.json":
                    AutoConfig.from_pretrained(Path(found).parent)
            if weights and not pins:
                for info in retried(api.get_paths_info, repo_id, weights, revision=commit.oid):
                    if info.lfs is not None and info.lfs.sha256 != sha256_of(folder / info.path):
                        raise PublishedError(f"{where} {info.path} there is not what was sent. Push it again.")
        except (HfHubHTTPError, OSError) as error:
            raise PublishedError(f"{where} it can't be fetched from there: {error}. Try to load it later.") from error
    for part, pin in pins.items():
        source, revision = str(pin.get("source")), pin.get("revision")
        if source in EMBEDDED:  # also from PyPI
            continue
        try:
            retried(api.model_info, source, revision=revision)
        except (HfHubHTTPError, OSError, HFValidationError) as error:
            at = f" at commit {revision}" if revision else ""
            raise PublishedError(
                f"{where} its {part}, {source}{at}, can't be found on the Hub: nobody can load the bridge. Publish "
                f"that first, or name a repository with the same weights (vlbridge push --part {part}=OWNER/NAME)."
            ) from error


def push_saved(
    folder: str | os.PathLike, repo_id: str, *, with_code: bool = False, parts: dict[str, str] | None = None, **options
) -> CommitInfo:
    """Upload a saved model's folder, and add a model card if it has none. The folder is not changed.

    Args:
        folder: Folder of a model of this package, whole or bridge alone; other files in it are uploaded too, except
            checkpoints of its training.
        repo_id: `name` or `owner/name`; the repository is created if it does not exist.
        with_code: Add the code, so that transformers alone can load the model with `trust_remote_code=True`.
        parts: Hub ids of frozen parts that lie in folders here, by the parts' names; their weights are compared.
        options: Further arguments of `push_folder`.

    Returns:
        The commit.

    Raises:
        ValueError: The folder does not hold a model of this package, or a bridge that nobody else could load.
        PublishedError: What was uploaded can't be loaded, see `check_published`.
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses the upload, or fails at every attempt.
    """
    from .cards import card_of_folder

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"There is no config.json in {folder}; expected the folder of a saved model.")
    with tempfile.TemporaryDirectory() as temporary:
        view = Path(temporary) / repo_id.rpartition("/")[2]
        for path in (path for path in folder.rglob("*") if path.is_file()):
            target = view / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                if path.suffix == ".json":  # add_code writes to some of them
                    raise OSError
                target.symlink_to(path.resolve())
            except OSError:
                shutil.copy2(path, target)
        _name_parts(view, parts or {})
        if with_code:
            config = AutoConfig.from_pretrained(view)
            model_class = class_named((config.architectures or [""])[0])
            if model_class is None:
                raise ValueError(f"{folder} holds a {config.architectures}; with_code is for models of vlbridge.")
            add_code(view, auto_map_of(type(config), model_class))
        keep = []
        if not (view / "README.md").exists():
            card_of_folder(view, repo_id).save(view / "README.md")
            keep = ["README.md"]  # an existing card of the repository takes precedence over a generated one
        done = push_folder(view, repo_id, keep=keep, **{"commit_message": "Upload model", **options})
        check_published(view, done, options.get("token"))
        return done


class HubPublisher:
    """The `Publisher` of models and processors, see `vlbridge.extensions`."""

    def write_card(self, folder: Path, repo_id: str | None = None, tags: Iterable[str] = ()) -> None:
        """Write a model card generated from the folder, if it has none or if there are tags to add."""
        from .cards import card_of_folder  # slow to import, because of the catalogue

        path = folder / "README.md"
        if path.exists() and not tags:
            return
        card = card_of_folder(folder, repo_id)
        card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *(tags or ())]))
        with replacing(path) as temporary:
            card.save(temporary)

    def add_code(
        self,
        folder: Path,
        processor_class: type | None,
        model_class: type | None = None,
        config_class: type | None = None,
    ) -> None:
        """Save the code of a model and its processor, or of a processor alone, into the folder."""
        if model_class is not None and config_class is not None:
            add_code(folder, auto_map_of(config_class, model_class, processor_class))
        elif processor_class is not None:
            add_code(folder, {"AutoProcessor": processor_class})

    def upload(self, folder: Path, repo_id: str, **options) -> CommitInfo:
        """See `push_folder`."""
        return push_folder(folder, repo_id, **options)


extensions.register_publisher(HubPublisher())

__all__ = ["PublishedError", "check_pins", "check_published", "push_folder", "push_saved"]
