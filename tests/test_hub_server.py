"""The local Hub, driven by the real client: what the other tests rely on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "notes.txt").write_text("notes")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.core
def test_upload_and_download(hub, folder, tmp_path):
    api = HfApi()
    assert api.whoami()["name"] == "me"
    assert api.create_repo("bridge").repo_id == "me/bridge"
    api.create_repo("me/bridge", exist_ok=True)
    with pytest.raises(HfHubHTTPError):
        api.create_repo("me/bridge")
    with pytest.raises(HfHubHTTPError):
        api.create_repo("someone/else")
    done = api.upload_folder(repo_id="me/bridge", folder_path=folder)
    assert hub.files("me/bridge") == contents(folder) and hub.history("me/bridge")[0] == done.oid
    assert api.model_info("me/bridge").sha == done.oid
    assert sorted(api.list_repo_files("me/bridge")) == sorted(contents(folder))
    tree = api.list_repo_tree("me/bridge", recursive=True)
    sizes = {entry.path: getattr(entry, "size", None) for entry in tree}
    assert sizes == {"config.json": 2, "model.safetensors": 256_000, "sub": None, "sub/notes.txt": 5}
    fetched = Path(snapshot_download("me/bridge"))
    assert fetched.name == done.oid and contents(fetched) == contents(folder)
    # nothing is sent again that is there already
    hub.requests.clear()
    assert api.upload_folder(repo_id="me/bridge", folder_path=folder).oid == done.oid
    assert not any(path.startswith("/lfs/") or "/commit/" in path for _, path in hub.requests)


def test_parts(hub, folder):
    hub.part_size = 100_000
    api = HfApi()
    api.create_repo("me/bridge")
    hub.fail(r"/lfs/\w+/2", cut_after=500)
    api.upload_file(path_or_fileobj=folder / "model.safetensors", path_in_repo="model.safetensors", repo_id="me/bridge")
    puts = [path for method, path in hub.requests if method == "PUT"]
    assert [path.rsplit("/", 1)[1] for path in puts] == ["1", "2", "2", "3"]
    assert hub.files("me/bridge")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_revisions(hub, folder):
    api = HfApi()
    first = hub.add("me/bridge", folder)
    (folder / "config.json").write_text('{"a": 1}')
    second = hub.add("me/bridge", folder)
    api.create_tag("me/bridge", tag="v1", revision=first)
    api.create_branch("me/bridge", branch="other", revision=first)
    refs = api.list_repo_refs("me/bridge")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "other": first}
    assert [ref.name for ref in refs.tags] == ["v1"]
    for revision, text in (("main", '{"a": 1}'), ("v1", "{}"), (first, "{}"), ("other", "{}")):
        assert open(hf_hub_download("me/bridge", "config.json", revision=revision)).read() == text
    request = api.upload_file(
        path_or_fileobj=b"new", path_in_repo="config.json", repo_id="me/bridge", create_pr=True, parent_commit=second
    )
    assert request.pr_num == 1 and hub.history("me/bridge")[0] == second
    assert hub.files("me/bridge", "refs/pr/1")["config.json"] == b"new"
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="y", repo_id="me/bridge", parent_commit=first)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/bridge", "config.json", revision="v2")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/bridge", "nothing.json")
    api.delete_file("config.json", repo_id="me/bridge")
    assert "config.json" not in hub.files("me/bridge")
    assert [commit.commit_id for commit in api.list_repo_commits("me/bridge")] == hub.history("me/bridge")


def test_private_repositories(hub, folder):
    HfApi().create_repo("lab/secret", private=True)
    hub.add("lab/secret", folder)
    assert HfApi().model_info("lab/secret").private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("lab/secret")
    with pytest.raises(HfHubHTTPError):
        HfApi(token="wrong").model_info("lab/secret")


def test_interrupted_downloads_go_on_where_they_were(hub, folder):
    hub.add("me/bridge", folder)
    hub.fail("/cdn/", cut_after=100_000)
    path = hf_hub_download("me/bridge", "model.safetensors")
    assert open(path, "rb").read() == (folder / "model.safetensors").read_bytes()
    assert len([path for _, path in hub.requests if path.startswith("/cdn/")]) == 2


def test_failures_are_answered_as_asked(hub, folder):
    hub.add("me/bridge", folder)
    hub.fail("/cdn/", status=429, retry_after=7)
    hf_hub_download("me/bridge", "model.safetensors")
    assert hub.waits and hub.waits[0] >= 7
    hub.fail("/api/models/me/bridge", times=10, status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        HfApi().model_info("me/bridge")
    assert sum(failure.times for failure in hub.failures) == 9
    hub.failures.clear()
    with hub.offline(known=False), pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("me/bridge", "config.json")


def test_etags_are_gits_and_lfs(hub, folder):
    hub.add("me/bridge", folder)
    blobs = {name: hf_hub_download("me/bridge", name) for name in ("config.json", "model.safetensors")}
    names = {name: os.path.basename(os.path.realpath(path)) for name, path in blobs.items()}
    assert names["config.json"] == hashlib.sha1(b"blob 2\0{}").hexdigest()
    assert names["model.safetensors"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_another_process(hub, folder, tmp_path):
    hub.add("me/bridge", folder)
    code = (
        "from huggingface_hub import hf_hub_download; print(open(hf_hub_download('me/bridge', 'config.json')).read())"
    )
    done = hub.run(tmp_path / "home", "-c", code)
    assert done.stdout.strip() == "{}", done.stderr
    again = hub.run(tmp_path / "home", "-c", code, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert again.stdout.strip() == "{}", again.stderr
