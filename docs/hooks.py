"""What `mkdocs.yml` needs beyond plain pages. Nothing generated is committed, so that it can't be out of date.

- The references of commands and recipes are written from the code.
- mkdocstrings reads the package from one folder: the repository's folders are put together as setup.cfg maps them.
- The documents in the root of the repository become pages, and files that pages link to are part of the site.
- The build fails if a page loads anything from another server.
"""

from __future__ import annotations

import configparser
import inspect
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
PROJECT = {  # documents in the root of the repository, as pages
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "SECURITY.md": "project/security.md",
    "README.md": "index.md",
}
GENERATED = ("reference/cli.md", "reference/recipes.md", *(page for page in PROJECT.values() if page != "index.md"))
LINK = re.compile(r"(\]\(|(?:src|href|srcset)=\")(?!https?://|mailto:|#|data:)([^)\s#\"]+)")
LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\b(?:src|srcset)=\"(?:https?:)?//[^\"]*|"
    r"<link\b[^>]*\brel=\"(?:stylesheet|preload|preconnect|icon)\"[^>]*\bhref=\"(?:https?:)?//[^\"]*|"
    r"@import[^;]*//[^;]*|url\([\"']?(?:https?:)?//[^)]*"
)


# ---------------------------------------------------------------------- references


def cli_reference() -> str:
    """The help of all commands, as `--help` prints it."""
    sys.path.insert(0, str(assemble()))
    try:
        from typer.main import get_command

        from vlbridge_cli.cli_app import app
    finally:
        sys.path.pop(0)
    lines = [
        "# Command line",
        "",
        "Results go to stdout, everything else to stderr. Exit codes: 0, all went well; 1, something failed; 2, the "
        "command line is wrong; 130, interrupted. `vlbridge COMMAND --help` shows the same as this page.",
    ]
    for name, text in _helps(get_command(app), "vlbridge", None):
        # a release is converted by its name, without the name of the command
        name = name.replace("convert release", "convert NAME OUTPUT")
        lines += ["", f"## {name}", "", "```text", *text.replace("convert release", "convert").splitlines(), "```"]
    return "\n".join(lines) + "\n"


def _helps(command, name: str, parent):
    """Name and help of a command and of all commands below it."""
    context = command.make_context(
        name.split()[-1], [], parent=parent, resilient_parsing=True, terminal_width=88, max_content_width=88
    )
    yield name, command.get_help(context)
    for child in getattr(command, "commands", {}).values():
        yield from _helps(child, f"{name} {child.name}", context)


def recipe_reference() -> str:
    """The keys of a recipe, and the recipes that ship with the package."""
    import ast

    import yaml

    source = (ROOT / "training" / "training_recipes.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = [
        "# Recipes",
        "",
        "A recipe is one YAML file that holds everything a training run depends on. "
        "[Train](../guides/train.md) shows how to use one.",
        "",
        "```yaml",
        *inspect.cleandoc(ast.get_docstring(tree, clean=False).split("\n\n")[1]).splitlines(),
        "```",
    ]
    titles = {
        "Recipe": "Keys of a recipe", "DataRecipe": "`data`", "EvaluationRecipe": "`evaluation`",
        "TextRecipe": "`text`", "CacheRecipe": "`cache_features`", "PackingRecipe": "`packing`",
        "SamplesRecipe": "`samples`",
    }  # fmt: skip
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in titles}
    for name, title in titles.items():
        lines += ["", f"## {title}", "", *_key_lines(classes[name])]
    lines += ["", "## Shipped recipes"]
    for path in sorted((ROOT / "training" / "recipes").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        description = yaml.safe_load(text)["description"]
        lines += ["", f"### {path.stem}", "", f"{description}.", "", "```yaml", *text.strip().splitlines()[1:], "```"]
    return "\n".join(lines) + "\n"


def _key_lines(node) -> list[str]:
    """A dataclass's docstring and fields as a table."""
    import ast

    docstring = ast.get_docstring(node)
    summary, _, arguments = docstring.partition("\n\nArgs:\n")
    described = {}
    for line in inspect.cleandoc(arguments).splitlines():
        if match := re.match(r"(\w+): (.*)", line):
            name = match[1]
            described[name] = match[2]
        else:
            described[name] += f" {line.strip()}"
    rows = []
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            name, default = field.target.id, "required" if field.value is None else ast.unparse(field.value)
            default = re.sub(r"field\(default_factory=(?:lambda: )?(.*)\)", r"\1", default)
            default = {"dict": "{}", "list": "[]", "None": "", "list(PARTS)": "both parts"}.get(default, default)
            default = re.sub(r"^\w+Recipe$", "", default).replace("'", '"')
            words = described.get(name, "").replace("|", "\\|")
            rows.append(f"| `{'from' if name == 'from_' else name}` | {words} | {f'`{default}`' if default else ''} |")
    return [summary.replace("\n", " "), "", "| key | | default |", "|---|---|---|", *rows]


# ---------------------------------------------------------------------- the package in one folder


def assemble() -> Path:
    """A folder with the package as it is installed; `on_post_build` removes it."""
    if assemble.folder is None:
        assemble.folder = Path(tempfile.mkdtemp(prefix="vlbridge-docs-"))
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg", encoding="utf-8")
        for line in setup["options"]["package_dir"].strip().splitlines():
            name, source = (part.strip() for part in line.split("="))
            target = assemble.folder.joinpath(*name.split("."))
            target.mkdir(parents=True, exist_ok=True)
            for path in (ROOT / source).glob("*.py"):
                shutil.copy2(path, target)
    return assemble.folder


assemble.folder = None


# ---------------------------------------------------------------------- links


def copied_to(name: str) -> str:
    """Where a file of the repository is on the site. Text gets the ending .txt, so that browsers show it."""
    is_text = Path(name).suffix not in (".json", ".png", ".svg")
    return "files/" + re.sub(r"(^|/)\.", r"\1", name) + (".txt" if is_text else "")


def rewritten(text: str, page: str, in_repository: str, linked: set[str]) -> str:
    """A page's text with links that lead somewhere on the site.

    Args:
        text: Markdown.
        page: Its path in the site's sources, such as `guides/compose.md`.
        in_repository: Its path in the repository, which links are relative to.
        linked: Gets the files outside of `docs/` that it links to, as paths in the repository.
    """

    def replaced(match: re.Match) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(in_repository), match[2]))
        if target in PROJECT:
            target = PROJECT[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif (ROOT / target).is_dir():
            files = sorted(path for path in (ROOT / target).iterdir() if path.is_file() and path.name != "__init__.py")
            readme = ROOT / target / "README.md"
            first = readme if readme.exists() else files[0]
            linked.update(f"{target}/{path.name}" for path in files)
            target = copied_to(f"{target}/{first.name}")
        elif (ROOT / target).is_file():
            linked.add(target)
            target = copied_to(target)
        else:
            return match[0]  # mkdocs reports it
        return match[1] + os.path.relpath(target, os.path.dirname(page) or ".")

    return LINK.sub(replaced, text)


# ---------------------------------------------------------------------- hooks


def on_config(config):
    """Point mkdocstrings to the assembled package."""
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(assemble())]
    return config


on_config.mkdocs_priority = 100  # before mkdocstrings reads its configuration


def on_files(files, config):
    """Add pages that are generated, and files that pages link to."""
    from mkdocs.structure.files import File

    pages = {"reference/cli.md": cli_reference(), "reference/recipes.md": recipe_reference()}
    sources = {page: f"docs/{page}" for page in pages}
    for name, page in PROJECT.items():
        if page != "index.md":
            pages[page], sources[page] = (ROOT / name).read_text(encoding="utf-8"), name
    linked: set[str] = set()
    for file in files.documentation_pages():
        rewritten(Path(file.abs_src_path).read_text(encoding="utf-8"), file.src_uri, f"docs/{file.src_uri}", linked)
    for page, text in pages.items():
        files.append(File.generated(config, page, content=rewritten(text, page, sources[page], linked)))
    for name in sorted(linked):
        files.append(File.generated(config, copied_to(name), content=(ROOT / name).read_bytes()))
    return files


def on_page_markdown(markdown, page, **_):
    """Rewrite the links of a page; those of generated pages are rewritten already."""
    if page.file.src_uri in GENERATED:
        return markdown
    return rewritten(markdown, page.file.src_uri, f"docs/{page.file.src_uri}", set())


def on_post_build(config):
    """Refuse pages that load anything from another server."""
    from mkdocs.exceptions import PluginError

    shutil.rmtree(assemble(), ignore_errors=True)
    assemble.folder = None
    found = {
        f"{path.relative_to(config.site_dir)}: {match}"
        for path in Path(config.site_dir).rglob("*")
        if path.suffix in (".html", ".css") and "files" not in path.relative_to(config.site_dir).parts
        for match in LOADED.findall(path.read_text(encoding="utf-8"))
    }
    if found:
        raise PluginError("Pages load things from other servers:\n" + "\n".join(sorted(found)[:20]))
