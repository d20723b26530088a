"""`make parity` itself: which folders of cases it takes, which tests it makes of them, and what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


PARITY = Path(__file__).parent / "parity"
CASES = PARITY / "cases"


def run(root: Path, *options: str) -> tuple[int, str]:
    """Exit code and output."""
    command = [sys.executable, "-m", "pytest", PARITY, "--parity-root", root, "-p", "no:cacheprovider", "-q", *options]
    done = subprocess.run(command, cwd=PARITY.parents[1], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def link(root: Path, name: str, without: str | None = None, to: str | None = None) -> Path:
    """A case of ours in another root, file by file."""
    folder = root / (to or name)
    folder.mkdir(parents=True)
    for path in (CASES / name).iterdir():
        if path.name != without:
            (folder / path.name).symlink_to(path)
    return folder


def test_one_case_alone(tmp_path):
    """All its tests pass in a test worker, nothing else fails or is skipped, and the last line counts the case."""
    (tmp_path / "blip2").mkdir()
    (tmp_path / "blip2" / "mine").symlink_to(CASES / "blip2" / "stage1_qformer", target_is_directory=True)
    (tmp_path / "README.md").write_text("What else lies there is not read.")
    (tmp_path / "manifests").mkdir()
    code, output = run(tmp_path, "-n", "1", "-rA")
    assert code == 0, output
    passed = {line.partition("::")[2] for line in output.splitlines() if line.startswith("PASSED ")}
    assert re.search(rf"^{len(passed)} passed(, \d+ warnings?)? in ", output, re.MULTILINE), output
    assert "test_stage1_losses[mine]" in passed and all(name.endswith("[mine]") for name in passed)
    assert not any(name.startswith("test_logits_and_loss") for name in passed)  # of stage 2
    assert f"of those in {tmp_path}: blip 0 of 0, blip2 1 of 1, llava 0 of 0, openflamingo 0 of 0" in output


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "{root} holds no case. Expected {root}/<family>/<case>/meta.json"),
        (lambda root: root.rmdir(), "there is no folder {root}."),
        (lambda root: (root / "blip").mkdir(), "its folders: blip."),
        (lambda root: link(root, "llava/v16_anyres", to="llama/mine"), "{root}/llama: no such family. Known are blip,"),
        (
            lambda root: link(root, "blip/blip_caption_itm", without="meta.json"),
            "blip_caption_itm: it has no meta.json.",
        ),
        (
            lambda root: link(root, "blip2/caption_coco_opt_vitunfrozen", without="llm"),
            "{root}/blip2/caption_coco_opt_vitunfrozen: it has no llm.",
        ),
        (
            lambda root: (link(root, "llava/v16_anyres", without="meta.json") / "meta.json").write_text("{"),
            "{root}/llava/v16_anyres: meta.json is not JSON",
        ),
    ],
    ids=["no case", "no folder", "an empty family", "unknown family", "no meta.json", "no language model", "no JSON"],
)
def test_what_is_wrong_is_named(make, message, tmp_path):
    root = tmp_path / "cases"
    root.mkdir()
    make(root)
    code, output = run(root)
    assert code == pytest.ExitCode.USAGE_ERROR, output
    assert message.format(root=root) in output and "Traceback" not in output
