"""What `make lint` holds besides ruff: layers without circles, types, and files and functions of a bearable length.

The layers of ARCHITECTURE.md are in pyproject.toml, under `tool.importlinter`, and so are the modules whose types are
checked, under `tool.mypy`. Both tools read a package from one folder, so the folders are first put together in a
temporary one, as setup.cfg maps them.
"""

import ast
import configparser
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
MOST_LINES_OF_A_FILE = 600
MOST_LINES_OF_A_FUNCTION = 80
# Signature and description of every argument of `forward` take most of them
LONGER = {"BridgedModel.forward", "QFormerBlip2ForPreTraining.forward"}


def packages() -> dict[str, Path]:
    """The package's folders by import name, as setup.cfg maps them."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    pairs = (line.split("=") for line in setup["options"]["package_dir"].strip().splitlines())
    return {name.strip(): ROOT / folder.strip() for name, folder in pairs}


def functions(tree: ast.AST, prefix: str = ""):
    """Names and lengths, in lines, of all functions in a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node.end_lineno - node.lineno + 1
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


def too_long() -> list[str]:
    """Files and functions of the package that are longer than allowed."""
    found = []
    for folder in packages().values():
        for path in sorted(folder.glob("*.py")):
            text = path.read_text(encoding="utf-8")
            lines = text.count("\n")
            where = path.relative_to(ROOT)
            if lines > MOST_LINES_OF_A_FILE:
                found.append(f"{where} has {lines} lines; at most {MOST_LINES_OF_A_FILE}.")
            found += [
                f"{where}: {name} has {count} lines; at most {MOST_LINES_OF_A_FUNCTION}."
                for name, count in functions(ast.parse(text))
                if count > MOST_LINES_OF_A_FUNCTION and name not in LONGER
            ]
    return found


def run_linters() -> int:
    """Run import-linter and mypy on the package as it is installed; the number of them that found something."""
    config = ROOT / "pyproject.toml"
    bin_folder = Path(sys.executable).parent
    commands = (
        [bin_folder / "lint-imports", "--no-cache", "--no-logo", config],
        [bin_folder / "mypy", "--config-file", config, "--cache-dir", ROOT / ".mypy_cache"],
    )
    with tempfile.TemporaryDirectory() as temporary:
        for name, folder in packages().items():
            target = Path(temporary).joinpath(*name.split("."))
            target.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.py"):
                shutil.copy2(path, target)
        environment = {**os.environ, "PYTHONPATH": temporary, "MYPYPATH": temporary}
        return sum(bool(subprocess.run(command, cwd=temporary, env=environment).returncode) for command in commands)


if __name__ == "__main__":
    problems = too_long()
    print("\n".join(problems) or "Files and functions are short enough.")
    sys.exit(run_linters() or bool(problems))
