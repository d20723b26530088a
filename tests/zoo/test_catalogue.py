"""The catalogue: every release is complete and names what is there; a release converts by its name, through the Hub's client."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from typer.testing import CliRunner

from vlbridge import catalogue
from vlbridge.cards import card_of_folder
from vlbridge.catalogue import CATALOGUE, File, find
from vlbridge.cli import app
from vlbridge.convert import convert_openflamingo


CASE = Path(__file__).parents[1] / "parity" / "cases" / "openflamingo" / "of3b_mosaicgpt_every1"
RELEASE = "openflamingo/OpenFlamingo-3B-vitl-mpt1b"
MANIFESTS = Path(__file__).parents[1] / "convert" / "manifests"


@pytest.mark.parametrize("release", CATALOGUE.values(), ids=lambda release: release.name)
def test_releases_are_complete(release):
    assert release.family in ("openflamingo", "blip2", "llava")
    assert release.title and (release.checkpoint or release.note)
    for part in (release.checkpoint, release.vision):
        if isinstance(part, File):
            assert part.where.startswith("https://") == (part.name is None)
        else:
            assert part is None or part.count("/") == 1
    if release.family == "openflamingo":
        assert len(release.published["COCO CIDEr"]) == len(release.published["VQAv2"]) == len(catalogue.SHOTS)
        assert all("<image>" in prompt for prompt in release.prompts.values())
    json.dumps(catalogue.rows())


def test_every_release_with_a_manifest_is_known():
    """What the conversions are tested with at full size is what the catalogue offers."""
    lavis = {
        path.name.split(".checkpoint_model")[0].removeprefix("blip2_")
        for path in MANIFESTS.glob("blip2_*.checkpoint_model*")
    }
    known = {name.split("/")[1].replace("vicuna", "instruct_vicuna") for name in CATALOGUE if name.startswith("blip2")}
    known |= {f"instruct_{name.split('/')[1]}" for name in CATALOGUE if "instruct/flan" in name}
    assert lavis and lavis <= known
    flamingo = {
        path.name.removeprefix("openflamingo_").split("_vitl")[0] for path in MANIFESTS.glob("openflamingo_*.gz")
    }
    assert flamingo == {"3b", "4b", "9b"}
    assert all(any(f"-{size.upper()}-vitl" in name for name in CATALOGUE) for size in flamingo)


def test_published_figures_are_those_of_the_papers():
    """A few of each table, typed once more."""
    assert find(RELEASE).published["COCO CIDEr"][4] == 77.3
    assert find("openflamingo/OpenFlamingo-9B-vitl-mpt7b").published["VQAv2"][32] == 53.3
    assert find("blip2_t5/pretrain_flant5xxl").published["VQAv2 test-dev"] == 65.0
    assert find("liuhaotian/llava-v1.5-13b").published["GQA"] == 63.3


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean openflamingo/OpenFlamingo-3B-vitl-mpt1b"):
        find("openflamingo/openflamingo-3b-vitl-mpt1b")
    done = CliRunner().invoke(app, ["convert", "someone/nothing", "out"])
    assert done.exit_code == 2 and "vlbridge list" in done.output


@pytest.mark.parametrize("name", ["liuhaotian/LLaVA-7b-delta-v0", "blip2_vicuna_instruct/vicuna7b",
                                  "openflamingo/OpenFlamingo-9B-deprecated"])  # fmt: skip
def test_what_can_not_be_fetched_says_what_to_do(name, tmp_path):
    done = CliRunner().invoke(app, ["convert", name, str(tmp_path / "out")])
    assert done.exit_code == 1 and CATALOGUE[name].note.split(":")[0] in done.output
    assert not (tmp_path / "out").exists()


def test_list():
    done = CliRunner().invoke(app, ["list"])
    assert done.exit_code == 0 and all(name in done.output for name in CATALOGUE)
    rows = [json.loads(line) for line in CliRunner().invoke(app, ["list", "--json"]).output.splitlines()]
    assert [row["name"] for row in rows] == list(CATALOGUE)
    assert rows[0]["checkpoint"] == {"where": RELEASE, "name": "checkpoint.pt", "revision": None}


# ---------------------------------------------------------------------- a Hub of our own


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does for files of `self.root/<owner>/<name>`; nothing else is there."""

    root: Path
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].removeprefix("/api/models").strip("/").split("/")
        path = self.root.joinpath(*parts[:2], *parts[4:])
        if len(parts) < 5 or parts[2] != "resolve" or not path.is_file():
            self.send_response(404)
            self.send_header(
                "X-Error-Code", "EntryNotFound" if self.root.joinpath(*parts[:2]).is_dir() else "RepoNotFound"
            )
            self.send_header("X-Repo-Commit", self.commit)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """The tiny case, where the real release lies."""
    root = tmp_path / "hub"
    release = CATALOGUE[RELEASE]
    clip = json.loads((CASE / "meta.json").read_text())["config"]["clip"]
    heads = {"num_attention_heads": clip["vision_cfg"]["width"] // clip["vision_cfg"]["head_width"]}
    convert_openflamingo(
        CASE / "checkpoint.pt", CASE / "clip_open_clip.pt", CASE / "base_lm", tmp_path / "expected",
        tokenizer=CASE / "tokenizer_base", config={"vision_config": heads},
    )  # fmt: skip
    AutoModel.from_pretrained(tmp_path / "expected").vision_model.save_pretrained(root / release.vision)
    shutil.copytree(CASE / "base_lm", root / release.language)
    shutil.copytree(CASE / "tokenizer_base", root / release.language, dirs_exist_ok=True)
    (root / RELEASE).mkdir(parents=True)
    shutil.copy(CASE / "checkpoint.pt", root / RELEASE)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("TinyHub", (Hub,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "expected"
    server.shutdown()
    server.server_close()


def run(endpoint: str, home: Path, *arguments) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    environment.update(HF_ENDPOINT=endpoint, HF_HOME=str(home), OMP_NUM_THREADS="1")
    environment = {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, "-m", "vlbridge.cli", *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def test_a_release_converts_by_its_name(hub, tmp_path):
    """With the Hub's real client, and nothing else given; the same model as from the files."""
    endpoint, expected = hub
    done = run(endpoint, tmp_path / "home", "convert", RELEASE, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "perceiver_flamingo" in done.stdout
    one, other = (AutoModel.from_pretrained(folder).state_dict() for folder in (tmp_path / "out", expected))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    certificate = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert CATALOGUE[RELEASE].language in certificate["inputs"]
    assert str(tmp_path) not in json.dumps(certificate)
    card = card_of_folder(tmp_path / "out")
    assert card.data.base_model == [CATALOGUE[RELEASE].vision, CATALOGUE[RELEASE].language]
    assert {result.metric_value for result in card.data.eval_results} >= {77.3, 46.2}


def test_a_missing_file_is_named(hub, tmp_path):
    endpoint, _ = hub
    (tmp_path / "hub" / RELEASE / "checkpoint.pt").unlink()
    done = run(endpoint, tmp_path / "home", "convert", RELEASE, tmp_path / "out")
    assert done.returncode == 1
    assert "checkpoint.pt" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_files_from_urls_are_fetched_once(hub, tmp_path, monkeypatch):
    """LAVIS' files lie on a server of their own."""
    endpoint, _ = hub
    monkeypatch.setattr("vlbridge.demo.cache_dir", lambda: tmp_path / "cache")
    part = File(f"{endpoint}/{RELEASE}/resolve/main/checkpoint.pt")
    first = catalogue.fetch(part)
    assert Path(first).read_bytes() == (CASE / "checkpoint.pt").read_bytes()
    (tmp_path / "hub" / RELEASE / "checkpoint.pt").unlink()
    assert catalogue.fetch(part) == first
    with pytest.raises(OSError, match="nothing.pt can't be fetched"):
        catalogue.fetch(File(f"{endpoint}/{RELEASE}/resolve/main/nothing.pt"))
