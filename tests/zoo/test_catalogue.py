"""The catalogue: every release is complete and names what is there; a release converts by its name."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
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
    """The conversions are tested at full size with the releases of the catalogue."""
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
    """A few figures of each table."""
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
def test_releases_that_can_not_be_fetched_say_what_to_do(name, tmp_path):
    done = CliRunner().invoke(app, ["convert", name, str(tmp_path / "out")])
    assert done.exit_code == 1 and CATALOGUE[name].note.split(":")[0] in done.output
    assert not (tmp_path / "out").exists()


def test_list():
    done = CliRunner().invoke(app, ["list"])
    assert done.exit_code == 0 and all(name in done.output for name in CATALOGUE)
    rows = [json.loads(line) for line in CliRunner().invoke(app, ["list", "--json"]).output.splitlines()]
    assert [row["name"] for row in rows] == list(CATALOGUE)
    assert rows[0]["checkpoint"] == {"where": RELEASE, "name": "checkpoint.pt", "revision": None}


# ---------------------------------------------------------------------- with the Hub's client


@pytest.fixture
def released(hub, tmp_path):
    """The tiny case in place of the real release, on the local Hub; returns its conversion."""
    release = CATALOGUE[RELEASE]
    clip = json.loads((CASE / "meta.json").read_text())["config"]["clip"]
    heads = {"num_attention_heads": clip["vision_cfg"]["width"] // clip["vision_cfg"]["head_width"]}
    convert_openflamingo(
        CASE / "checkpoint.pt", CASE / "clip_open_clip.pt", CASE / "base_lm", tmp_path / "expected",
        tokenizer=CASE / "tokenizer_base", config={"vision_config": heads},
    )  # fmt: skip
    AutoModel.from_pretrained(tmp_path / "expected").vision_model.save_pretrained(tmp_path / "clip")
    hub.add(release.vision, tmp_path / "clip")
    shutil.copytree(CASE / "base_lm", tmp_path / "language")
    shutil.copytree(CASE / "tokenizer_base", tmp_path / "language", dirs_exist_ok=True)
    hub.add(release.language, tmp_path / "language")
    (tmp_path / "release").mkdir()
    shutil.copy(CASE / "checkpoint.pt", tmp_path / "release")
    hub.add(RELEASE, tmp_path / "release")
    return tmp_path / "expected"


def test_a_release_that_can_not_be_fetched_is_asked_for_once(hub, tmp_path):
    """Not for minutes, as loading it would."""
    command = ["convert", "liuhaotian/llava-v1.5-7b", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "it is not a folder here, and the Hub has no such model" in done.stderr
    assert [path for _, path in hub.requests if "llava" in path] == ["/api/models/liuhaotian/llava-v1.5-7b"]
    with hub.offline(known=False):
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "the Hub cannot be reached" in done.stderr


def test_a_release_converts_by_its_name(hub, released, tmp_path):
    """With its name alone; the model is the same as from the files."""
    done = hub.run(tmp_path / "home", "-m", "vlbridge.cli", "convert", RELEASE, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "perceiver_flamingo" in done.stdout
    one, other = (AutoModel.from_pretrained(folder).state_dict() for folder in (tmp_path / "out", released))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    certificate = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert CATALOGUE[RELEASE].language in certificate["inputs"]
    assert str(tmp_path) not in json.dumps(certificate)
    card = card_of_folder(tmp_path / "out")
    assert card.data.base_model == [CATALOGUE[RELEASE].vision, CATALOGUE[RELEASE].language]
    assert {result.metric_value for result in card.data.eval_results} >= {77.3, 46.2}


def test_a_missing_file_is_named(hub, tmp_path):
    (tmp_path / "release").mkdir()
    hub.add(RELEASE, tmp_path / "release")
    done = hub.run(tmp_path / "home", "-m", "vlbridge.cli", "convert", RELEASE, tmp_path / "out")
    assert done.returncode == 1
    assert "checkpoint.pt" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def part(hub, tmp_path, monkeypatch):
    """A file that is downloaded from a URL, as LAVIS' files are."""
    (tmp_path / "release").mkdir()
    shutil.copy(CASE / "checkpoint.pt", tmp_path / "release")
    hub.add(RELEASE, tmp_path / "release")
    monkeypatch.setenv("VLBRIDGE_CACHE", str(tmp_path / "cache"))
    return File(f"{hub.endpoint}/{RELEASE}/resolve/main/checkpoint.pt")


def test_files_from_urls_are_fetched_once(hub, part, tmp_path):
    first = Path(catalogue.fetch(part))
    content = (CASE / "checkpoint.pt").read_bytes()
    assert first.read_bytes() == content
    note = json.loads(first.with_name("checkpoint.pt.origin").read_text())
    assert note == {"url": part.where, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del hub.repositories[RELEASE]
    assert catalogue.fetch(part) == str(first)
    with pytest.raises(OSError, match="nothing.pt can't be fetched"):
        catalogue.fetch(File(f"{hub.endpoint}/{RELEASE}/resolve/main/nothing.pt"))


def test_a_download_that_ends_early_is_noticed(hub, part, tmp_path):
    """The server announces the whole file, and closes the connection after a part of it."""
    hub.fail("/cdn/", method="GET", cut_after=1000)
    with pytest.raises(OSError, match="checkpoint.pt can't be fetched: the connection ended after 1,000 of"):
        catalogue.fetch(part)
    assert list((tmp_path / "cache" / "releases").iterdir()) == []
    assert Path(catalogue.fetch(part)).read_bytes() == (CASE / "checkpoint.pt").read_bytes()


def test_a_file_that_changed_since_its_download_is_fetched_again(part):
    path = Path(catalogue.fetch(part))
    content = path.read_bytes()
    for damaged in (content[:-10], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        assert Path(catalogue.fetch(part)).read_bytes() == content
    # nothing is known about a file without a note, such as one that an earlier version downloaded
    path.with_name("checkpoint.pt.origin").unlink()
    path.write_bytes(b"older")
    assert Path(catalogue.fetch(part)).read_bytes() == b"older"


@pytest.mark.parametrize("content, whole", [(b"weights", True), (b"weighty", False)])
def test_the_md5_that_a_server_announces_is_compared(content, whole, tmp_path, monkeypatch):
    """Google's storage, where LAVIS' files lie, announces it in a header."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", f"md5={base64.b64encode(hashlib.md5(b'weights').digest()).decode()}")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("VLBRIDGE_CACHE", str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        part = File(f"http://127.0.0.1:{server.server_port}/file.pth")
        if whole:
            assert Path(catalogue.fetch(part)).read_bytes() == content
        else:
            with pytest.raises(OSError, match="file.pth can't be fetched: its MD5 is"):
                catalogue.fetch(part)
            assert list((tmp_path / "releases").iterdir()) == []
        server.shutdown()
