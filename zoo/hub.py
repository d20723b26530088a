"""Repositories on the Hub: uploads in one commit, requests that are repeated, and code that travels with a model.

Source: `transformers/dynamic_module_utils.py` for what code files must look like: they lie flat in one folder, and only
`from .name import ...` between them is followed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig
from transformers.utils import logging

from .compat import PROCESSOR_MAPPING


logger = logging.get_logger(__name__)

ATTEMPTS = 4
# one checkpoint's files: those of an earlier one must not stay beside them
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
TRANSIENT = (408, 429, 500, 502, 503, 504)
IGNORED = re.compile(
    r"(.*/)?(\.git|\.cache|__pycache__)/.*"
)  # not part of a model, as for huggingface_hub's upload_folder


def cache_dir() -> Path:
    """Folder for what this package keeps: the one named by the environment variable `VLBRIDGE_CACHE`, else `vlbridge` in
    the Hugging Face home."""
    override = os.environ.get("VLBRIDGE_CACHE")
    return Path(override).expanduser() if override else Path(constants.HF_HOME) / "vlbridge"


# ---------------------------------------------------------------------- requests that are repeated


def _passing_error(error: BaseException) -> BaseException | None:
    """The error of the HTTP client behind `error`, where it may be gone the next time."""
    while error is not None and not isinstance(error, LocalEntryNotFoundError):  # for which the client has tried again
        response = getattr(error, "response", None)
        if response is not None and hasattr(response, "status_code"):
            return error if response.status_code in TRANSIENT else None
        # httpx, or what has taken its place in later versions of huggingface_hub
        if any(base.__name__ == "TransportError" for base in type(error).__mro__):
            return error
        error = error.__cause__ if isinstance(error, OSError) else None
    return None


def retried(function: Callable, *args, **kwargs):
    """Call a function that asks the Hub, and again where the Hub or the network failed for the moment.

    The Hub's client repeats uploads and most requests for files by itself; not the making of repositories and commits, nor
    downloads that are reset or answered with a server error.

    Args:
        function: What to call; it must not matter whether it runs twice.
        args: Its arguments.
        kwargs: Likewise.

    Returns:
        What it returns.

    Raises:
        Exception: What it raised at the last of `ATTEMPTS` attempts, or at once where trying again is of no use.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            passing = _passing_error(error)
            if passing is None or constants.HF_HUB_OFFLINE or attempt == ATTEMPTS:
                raise
            wait = 2.0 ** (attempt - 1)
            asked = getattr(getattr(passing, "response", None), "headers", {}).get("Retry-After", "")
            wait = max(wait, float(asked)) if asked.isdigit() else wait
            logger.warning(f"{str(passing).splitlines()[0] or type(passing).__name__}: trying again in {wait:.0f} s.")
            time.sleep(wait)


# ---------------------------------------------------------------------- uploads


def push_options(kwargs: dict) -> dict:
    """Take out of `kwargs` what is for `push_folder`."""
    names = ("private", "token", "revision", "create_pr", "commit_message", "commit_description")
    return {name: kwargs.pop(name) for name in names if name in kwargs}


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
    """Upload a folder in one commit: the repository shows all of it or nothing.

    Args:
        folder: A saved model, or files for one. Files of the repository that are not in it stay; but new weights replace the
            old ones, however many files these were.
        repo_id: `name` or `owner/name`; the repository is made if it is not there.
        private: Of a new repository: who may see it; `None` leaves that to the account's settings.
        token: Hub token; `None` takes the saved one.
        revision: Branch to commit to, made if it is not there; `None` takes the main one.
        create_pr: Open a pull request instead.
        commit_message: First line.
        commit_description: The rest.
        keep: Files that are not replaced where the repository has them.

    Returns:
        The commit; `.oid` is its hash.

    Raises:
        ValueError: There is nothing in the folder.
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses it, or still fails after several attempts.
    """
    folder = Path(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths = {name: path for name, path in paths.items() if not IGNORED.fullmatch(name)}
    if not paths:
        raise ValueError(f"There are no files in {folder}; expected the folder of a saved model.")
    api = HfApi(library_name="vlbridge", token=token)
    repo_id = retried(api.create_repo, repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        retried(api.create_branch, repo_id, branch=revision, exist_ok=True)
    for name in keep:
        if name in paths and retried(api.file_exists, repo_id, name, revision=revision):
            del paths[name]

    def commit() -> CommitInfo:
        # the operations anew for each attempt: so the client sees what an attempt whose answer was lost has done
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in paths.items()]
        if any(map(WEIGHTS.fullmatch, paths)):
            known = api.list_repo_files(repo_id, revision=revision)
            stale = [name for name in known if WEIGHTS.fullmatch(name) and name not in paths]
            operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        return api.create_commit(
            repo_id, operations, commit_message=commit_message or f"Upload {len(paths)} files",
            commit_description=commit_description, revision=revision, create_pr=create_pr,
        )  # fmt: skip

    return retried(commit)


def push_saved(folder: str | os.PathLike, repo_id: str, *, with_code: bool = False, **options) -> CommitInfo:
    """Upload a saved model as it lies in its folder, with a model card where there is none. The folder stays as it is.

    Args:
        folder: Of a model of this package, whole or bridge alone, and whatever else is to go with it.
        repo_id: As for `push_folder`.
        with_code: Add the code, so that transformers alone can load it with `trust_remote_code=True`.
        options: As for `push_folder`.

    Returns:
        The commit.

    Raises:
        ValueError: There is no such model in the folder.
        huggingface_hub.errors.HfHubHTTPError: As for `push_folder`.
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
        if with_code:
            config = AutoConfig.from_pretrained(view)
            package = importlib.import_module(__package__)
            model_class = getattr(package, (config.architectures or [""])[0], None)
            if model_class is None:
                raise ValueError(f"{folder} holds a {config.architectures}; with_code is for models of vlbridge.")
            add_code(view, auto_map_of(type(config), model_class))
        keep = []
        if not (view / "README.md").exists():
            card_of_folder(view, repo_id).save(view / "README.md")
            keep = ["README.md"]  # what is there was written by someone who knew more
        return push_folder(view, repo_id, keep=keep, **{"commit_message": "Upload model", **options})


# ---------------------------------------------------------------------- code


def _rewritten(module: str, followed: set[str]) -> str:
    """A module's source with imports that work in a flat folder.

    Relative imports of modules in `followed` become `from .name import`; other modules of this package are asked of an
    installed vlbridge. What is imported inside functions is not needed by everyone: `try` around it keeps transformers from
    counting it as a requirement.
    """
    source = inspect.getsource(importlib.import_module(module))
    tree, lines = ast.parse(source), source.splitlines()
    attempted = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in sorted(imports, key=lambda node: -node.lineno):
        first = node.lineno - 1
        statement = lines[first : node.end_lineno]
        target = _target(module, node)
        if target is not None:
            name = "." + target.rpartition(".")[2] if target in followed else target
            statement[0] = re.sub(r"from\s+\.[\w.]*\s+import", f"from {name} import", statement[0])
        if target not in followed and node not in tree.body and id(node) not in attempted:
            indent = " " * node.col_offset
            failed = ["except ImportError:", "    raise"]
            if target is not None:
                message = 'raise ImportError("This needs vlbridge itself: pip install vlbridge") from error'
                failed = ["except ImportError as error:", f"    {message}"]
            inside = [f"    {line}" for line in statement]
            statement = [f"{indent}try:", *inside, *(f"{indent}{line}" for line in failed)]
        lines[first : node.end_lineno] = statement
    if not lines[0].startswith("# Part of vlbridge"):
        lines.insert(0, "# Part of vlbridge (Apache-2.0), laid flat: this copy belongs to the model beside it.")
    return "\n".join(lines) + "\n"


def _target(module: str, node: ast.stmt) -> str | None:
    """Full name of the module that a relative import in `module` means; `None` for other statements."""
    if not isinstance(node, ast.ImportFrom) or not node.level:
        return None
    return importlib.util.resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])


def flat_code(classes: Iterable[type]) -> dict[str, str]:
    """The code that classes need, as files that work side by side in one folder, without this package.

    Args:
        classes: Of this package.

    Returns:
        Contents by file name.

    Raises:
        ValueError: Two modules have one name, or a module imports a whole package.
    """
    todo, found = sorted({cls.__module__ for cls in classes}), []
    while todo:
        module = todo.pop()
        if module in found:
            continue
        found.append(module)
        loaded = importlib.import_module(module)
        if hasattr(loaded, "__path__"):
            raise ValueError(f"{module} is a package; only single modules can be laid flat.")
        tree = ast.parse(inspect.getsource(loaded))
        todo += [target for node in tree.body if (target := _target(module, node)) is not None]
    names = [module.rpartition(".")[2] for module in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"Several modules are called {', '.join(twice)}; in one folder they would overwrite each other."
        )
    return {f"{name}.py": _rewritten(module, set(found)) for name, module in sorted(zip(names, found))}


def auto_map_of(config_class: type, model_class: type, processor_class: type | None = None) -> dict[str, type]:
    """What `add_code` takes.

    Args:
        config_class: Of the model.
        model_class: Its `auto_classes` tell which Auto classes are to give it.
        processor_class: `None` takes the one that is registered for the configuration.
    """
    auto_map = {"AutoConfig": config_class, **dict.fromkeys(model_class.auto_classes, model_class)}
    processor_class = processor_class or PROCESSOR_MAPPING.get(config_class, None)
    return auto_map if processor_class is None else {**auto_map, "AutoProcessor": processor_class}


def add_code(folder: str | os.PathLike, auto_map: dict[str, type]) -> None:
    """Put code beside a saved model, so that transformers alone can load it with `trust_remote_code=True`.

    Args:
        folder: Of the model, or of the processor alone.
        auto_map: Names of Auto classes, and the class that each of them is to give.
    """
    folder = Path(folder)
    for name, source in flat_code(auto_map.values()).items():
        temporary = folder / f".{name}.tmp"
        temporary.write_text(source, encoding="utf-8")
        os.replace(temporary, folder / name)
    references = {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in auto_map.items()}
    processors = {name: reference for name, reference in references.items() if name == "AutoProcessor"}
    for file, wanted in (("config.json", references), ("processor_config.json", processors)):
        if wanted and (path := folder / file).is_file():
            about = json.loads(path.read_text(encoding="utf-8"))
            about["auto_map"] = {**about.get("auto_map", {}), **wanted}
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(temporary, path)


__all__ = ["add_code", "auto_map_of", "cache_dir", "flat_code", "push_folder", "push_options", "push_saved", "retried"]
