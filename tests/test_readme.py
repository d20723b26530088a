"""What the README and the pages in docs/ show is what happens.

- Its ```python blocks run from top to bottom in one namespace, in an empty folder.
- The lines of its ```bash blocks that start with `vlbridge` run too, in the same folder, and must succeed.
- What a block prints to stdout is compared with the ```text block directly behind it, if there is one.
- Other commands are not run, but the targets of `make` must exist.
- `<!-- not run: REASON -->` directly in front of a block keeps it from running; Python must compile all the same.
"""

import difflib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# commands that may be shown without being tried
NOT_RUN = ("accelerate", "cat", "cd", "export", "git", "hf", "lmms-eval", "make", "pip", "python", "torchrun")
FENCED = re.compile(
    r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL
)
MARKED = re.compile(r"<!-- not run: \S.*?-->\s*\Z", re.DOTALL)


@dataclass
class Block:
    """A fenced block of a Markdown file.

    Args:
        path: The file.
        line: Line of its first line of code, counted from 1.
        language: What stands behind the opening fence.
        code: Its text.
        expected: The text block directly behind it.
        runs: False where the file says that it is not run.
    """

    path: Path
    line: int
    language: str
    code: str
    expected: str | None = None
    runs: bool = True

    @property
    def place(self) -> str:
        return f"{self.path.name}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a file; text blocks that show what the block before prints are part of that one."""
    text, blocks, end = path.read_text(encoding="utf-8"), [], 0
    for match in FENCED.finditer(text):
        between, code = text[end : match.start()], match["code"]
        end = match.end()
        if match["language"] == "text" and blocks and not between.strip() and blocks[-1].expected is None:
            blocks[-1].expected = code
            continue
        line = text.count("\n", 0, match.start("code")) + 1
        blocks.append(Block(path, line, match["language"], code, runs=not MARKED.search(between)))
    return blocks


def commands_of(block: Block) -> list[str]:
    """The commands of a bash block, continued lines put together, comments and blank lines left out."""
    lines = (line.strip().removeprefix("$ ") for line in block.code.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def compare(block: Block, printed: str) -> None:
    if block.expected is None or printed.strip() == block.expected.strip():
        return
    difference = difflib.unified_diff(
        block.expected.strip().splitlines(), printed.strip().splitlines(), "shown", "printed", lineterm=""
    )
    pytest.fail(f"{block.place}: the block prints something else\n" + "\n".join(difference), pytrace=False)


def run_python(block: Block, namespace: dict) -> None:
    # the file's own name and lines: a traceback shows where in the file it was
    code = compile("\n" * (block.line - 1) + block.code, str(block.path), "exec")
    if not block.runs:
        return
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code, namespace)
    compare(block, printed.getvalue())


def run_bash(block: Block) -> None:
    commands = commands_of(block)
    for command in commands:
        word = command.split()[0]
        if word not in ("vlbridge", *NOT_RUN):
            pytest.fail(
                f"{block.place}: can't check {command!r}; expected vlbridge or one of {', '.join(NOT_RUN)}",
                pytrace=False,
            )
        if word == "make":
            check_targets(block.place, shlex.split(command, comments=True)[1:])
    commands = [command for command in commands if command.split()[0] == "vlbridge"]
    if not commands or not block.runs:
        return
    interpreter = shlex.quote(sys.executable)  # `vlbridge` of this interpreter, whatever is on the PATH
    script = [f'vlbridge() {{ {interpreter} -m vlbridge_cli "$@"; }}', "set -euo pipefail", *commands]
    environment = {**os.environ, "COLUMNS": "120", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [shutil.which("bash"), "-c", "\n".join(script)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=540,
    )
    if result.returncode:
        pytest.fail(
            f"{block.place}: exit code {result.returncode} of\n{block.code}\nstderr:\n{result.stderr[-3000:]}",
            pytrace=False,
        )
    compare(block, result.stdout)


def make_targets() -> set[str]:
    makefile = ROOT / "Makefile"
    text = makefile.read_text(encoding="utf-8") if makefile.is_file() else ""
    return {name for names in re.findall(r"^([\w.][\w. -]*):(?!=)", text, re.MULTILINE) for name in names.split()}


def check_targets(place: str, arguments: list[str]) -> None:
    wanted = {word for word in arguments if "=" not in word and not word.startswith("-")}
    if missing := wanted - make_targets():
        pytest.fail(f"{place}: the Makefile has no target {', '.join(sorted(missing))}", pytrace=False)


@pytest.mark.skipif(shutil.which("bash") is None, reason="the blocks are written for bash")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_blocks_do_what_they_show(path, tmp_path, monkeypatch):
    # a folder of its own, with the pictures where a checkout has them
    shutil.copytree(
        ROOT / "zoo" / "assets", tmp_path / "zoo" / "assets", ignore=shutil.ignore_patterns("*.py", "easy*")
    )
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(path)
    if path.name == "README.md":
        assert any(block.language == "python" and block.runs for block in blocks)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        if block.language == "python":
            run_python(block, namespace)
        elif block.language == "bash":
            run_bash(block)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_make_targets_in_the_text_exist(path):
    for target in re.findall(r"`make ([\w.-]+)`", path.read_text(encoding="utf-8")):
        check_targets(path.name, [target])


EXAMPLE = """\
# Title
```python
x = 20
print(x + 1)
```

```text
21
```

```python
print(x)
```
Words.
```text
stands alone
```
<!-- not run: needs a large download -->
```python
raise SystemExit
```
```bash
pip install vlbridge      # not run
vlbridge --help \\
    > help.txt
```
"""


def test_blocks_of_an_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EXAMPLE.md").write_text(EXAMPLE)
    blocks = blocks_of(tmp_path / "EXAMPLE.md")
    assert [(block.language, block.line, block.expected, block.runs) for block in blocks] == [
        ("python", 3, "21\n", True),
        ("python", 12, None, True),
        ("text", 16, None, True),
        ("python", 20, None, False),
        ("bash", 23, None, True),
    ]
    namespace = {}
    for block in blocks:
        if block.language == "python":
            run_python(block, namespace)
    assert namespace["x"] == 20
    assert commands_of(blocks[-1])[1].split() == ["vlbridge", "--help", ">", "help.txt"]
    run_bash(blocks[-1])
    assert "Usage" in (tmp_path / "help.txt").read_text()


def test_differences_and_failures_are_reported(tmp_path):
    path = tmp_path / "EXAMPLE.md"
    with pytest.raises(pytest.fail.Exception, match=r"(?s)EXAMPLE.md:7: .*-2\n\+1"):
        run_python(Block(path, 7, "python", "print(1)", expected="2"), {})
    with pytest.raises(pytest.fail.Exception, match=r"(?s)EXAMPLE.md:7: exit code 2 .*No such option"):
        run_bash(Block(path, 7, "bash", "vlbridge --no-such-option"))
    with pytest.raises(pytest.fail.Exception, match="EXAMPLE.md:7: can't check 'rm -r .'"):
        run_bash(Block(path, 7, "bash", "rm -r ."))
    with pytest.raises(pytest.fail.Exception, match="no target no-such-target"):
        run_bash(Block(path, 7, "bash", "make -j2 no-such-target"))
