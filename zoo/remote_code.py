"""Saving of code along with a model, so that transformers alone can load it with `trust_remote_code=True`.

Source: `transformers/dynamic_module_utils.py` for the form of such files: all are in one folder, and only imports of
the form `from .name import ...` between them are followed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .compat import PROCESSOR_MAPPING
from .files import write_json, write_text


def _rewritten(module: str, followed: set[str]) -> str:
    """A module's source with imports that work in a flat folder.

    Relative imports of modules in `followed` become `from .name import`; other modules of this package are imported
    from an installed vlbridge. Imports inside functions are optional: a `try` around them keeps transformers from
    treating them as requirements.
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
    """Full name of the module that a relative import in `module` refers to; `None` for other statements."""
    if not isinstance(node, ast.ImportFrom) or not node.level:
        return None
    return importlib.util.resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])


def flat_code(classes: Iterable[type]) -> dict[str, str]:
    """Collect the code of classes as files that work in one folder, without this package.

    Args:
        classes: Classes of this package.

    Returns:
        Contents by file name.

    Raises:
        ValueError: Two modules have the same name, or a module imports a whole package.
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


def auto_map_of(config_class: type, model_class: Any, processor_class: type | None = None) -> dict[str, type]:
    """Build the argument `auto_map` of `add_code`.

    Args:
        config_class: The model's configuration class.
        model_class: The model class, whose `auto_classes` list the Auto classes that should load it.
        processor_class: The processor class; `None` takes the one that is registered for the configuration.
    """
    auto_map = {"AutoConfig": config_class, **dict.fromkeys(model_class.auto_classes, model_class)}
    processor_class = processor_class or PROCESSOR_MAPPING.get(config_class, None)
    return auto_map if processor_class is None else {**auto_map, "AutoProcessor": processor_class}


def add_code(folder: str | os.PathLike, auto_map: dict[str, type]) -> None:
    """Save code into a model's folder, so that transformers alone can load it with `trust_remote_code=True`.

    Args:
        folder: Folder of the model, or of the processor alone.
        auto_map: Names of Auto classes, and the class that each of them should load.
    """
    folder = Path(folder)
    for name, source in flat_code(auto_map.values()).items():
        write_text(folder / name, source)
    references = {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in auto_map.items()}
    processors = {name: reference for name, reference in references.items() if name == "AutoProcessor"}
    for file, wanted in (("config.json", references), ("processor_config.json", processors)):
        if wanted and (path := folder / file).is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            content["auto_map"] = {**content.get("auto_map", {}), **wanted}
            write_json(path, content, sort_keys=True)


__all__ = ["add_code", "auto_map_of", "flat_code"]
