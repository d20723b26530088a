"""Pictures in files, tars and Parquet files: what is found, read, and refused."""

from __future__ import annotations

import io
import pickle
import tarfile

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tiny import tiny_image

from vlbridge import shards
from vlbridge.images import ImageError
from vlbridge.shards import Files, ParquetShard, TarShard, find_sources


def content(seed: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    tiny_image(seed).save(file, kind)
    return file.getvalue()


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path, values, name="image", kind=None, **options):
    parquet.write_table(pyarrow.table({name: pyarrow.array(values, type=kind)}), path, **options)
    return path


def same(picture, seed: int) -> bool:
    return np.array_equal(np.asarray(picture.image()), np.asarray(tiny_image(seed)))


@pytest.fixture
def tar(tmp_path):
    """Three pictures, one of them with a name of more than 100 characters, among other members."""
    members = {"a.png": content(0), "a.json": b"{}", f"{'long/' * 30}b.PNG": content(1), "notes.txt": b"no picture",
               "c.d.png": content(2)}  # fmt: skip
    return write_tar(tmp_path / "one.tar", members)


def test_tar(tar):
    shard = pickle.loads(pickle.dumps(TarShard(str(tar))))
    assert len(shard) == 3
    names = [f"{tar}/{name}" for name in ("a.png", f"{'long/' * 30}b.PNG", "c.d.png")]
    assert [picture.name for picture in shard.pictures(0, 9)] == names
    assert all(same(picture, seed) for seed, picture in enumerate(shard.pictures(0, 3)))
    [last] = shard.pictures(2, 3)
    assert same(last, 2) and last.content() == content(2) and last.size() == tiny_image(2).size[::-1]


@pytest.mark.parametrize("cut", [600, 1300, 2100])
def test_tar_that_is_cut_off(tar, cut):
    """In a member's content, in a header, and in another's content."""
    tar.write_bytes(tar.read_bytes()[:cut])
    with pytest.raises(ValueError, match="one.tar is damaged or cut off after . pictures: .*leave it out"):
        TarShard(str(tar))


def test_tar_with_a_broken_header(tar):
    data = bytearray(tar.read_bytes())
    second = 512 + -(-len(content(0)) // 512) * 512
    data[second : second + 100] = b"x" * 100
    tar.write_bytes(data)
    with pytest.raises(ValueError, match="damaged or cut off after 1 pictures"):
        TarShard(str(tar))


VALUES = {
    "content": lambda folder: [content(k) for k in range(5)],
    "struct": lambda folder: [{"bytes": content(k), "path": "x"} for k in range(5)],
    "struct of paths": lambda folder: [{"bytes": None, "path": f"{k}.png"} for k in range(5)],
    "paths": lambda folder: [f"{k}.png" for k in range(4)] + [str(folder / "4.png")],
}


@pytest.mark.parametrize("kind", VALUES)
def test_parquet(kind, tmp_path):
    for seed in range(5):
        tiny_image(seed).save(tmp_path / f"{seed}.png")
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    values = VALUES[kind](tmp_path)
    write_parquet(tmp_path / "one.parquet", values, kind=struct if "struct" in kind else None, row_group_size=2)
    shard = ParquetShard(str(tmp_path / "one.parquet"))
    assert len(shard) == 5
    for start, stop in [(0, 5), (1, 4), (3, 9), (0, 1)]:
        found = pickle.loads(pickle.dumps(shard)).pictures(start, stop)
        assert [picture.name for picture in found] == [f"{shard.path}/{k}" for k in range(start, min(stop, 5))]
        assert all(same(picture, start + k) for k, picture in enumerate(found))


def test_parquet_row_without_a_picture(tmp_path):
    shard = ParquetShard(str(write_parquet(tmp_path / "one.parquet", [content(0), None, b"no picture"])))
    good, none, broken = shard.pictures(0, 3)
    assert same(good, 0)
    for picture, why in ((none, "empty"), (broken, "not an image")):
        assert picture.size() is None
        with pytest.raises(ImageError, match=why):
            picture.image()


def test_parquet_that_is_refused(tmp_path):
    path = write_parquet(tmp_path / "one.parquet", [content(0)], name="picture")
    with pytest.raises(ValueError, match="has no column 'image'; it has picture. Name the column"):
        ParquetShard(str(path))
    assert len(ParquetShard(str(path), column="picture")) == 1
    with pytest.raises(ValueError, match="column 'image' is int64; expected the content of files"):
        ParquetShard(str(write_parquet(tmp_path / "numbers.parquet", [1, 2])))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged, cut off or not Parquet"):
        ParquetShard(str(path), column="picture")


def test_what_is_found(tar, tmp_path):
    write_parquet(tmp_path / "rows.parquet", [content(0)])
    (tmp_path / "more").mkdir()
    for name in ("b.png", "a.jpg", "more/c.png", ".hidden.png"):
        tiny_image().save(tmp_path / name)
    write_tar(tmp_path / "more" / ".hidden.tar", {})
    found = find_sources([tmp_path, tmp_path / "a.jpg", tar])
    assert [source.paths if isinstance(source, Files) else source.path for source in found] == [
        [str(tmp_path / "a.jpg"), str(tmp_path / "b.png")], str(tar), str(tmp_path / "rows.parquet"),
    ]  # fmt: skip
    everything = find_sources([tmp_path], recursive=True)
    assert len(everything[0]) == 3 and len(everything) == 3
    assert find_sources([tmp_path / "*.tar"])[0].path == str(tar)
    assert len(find_sources([tmp_path], recursive=True, leave_out=tmp_path / "more")[0]) == 2


def test_shards_are_counted_once(tar, monkeypatch):
    known = [source.described() for source in find_sources([tar])]
    with monkeypatch.context() as patch:
        patch.setattr(shards.TarShard, "members", None)  # calling it would fail
        assert [source.described() for source in find_sources([tar], known=known)] == known
    write_tar(tar, {"a.png": content(0)})
    assert len(find_sources([tar], known=known)[0]) == 1


def test_what_is_refused(tmp_path):
    with pytest.raises(ImageError, match="nowhere: no such file or folder"):
        find_sources([tmp_path / "nowhere"])
    with pytest.raises(ImageError, match="no image files, tars or Parquet files in this folder"):
        find_sources([tmp_path])
    (tmp_path / "one.tar.gz").touch()
    with pytest.raises(ValueError, match="one.tar.gz is compressed as a whole.*unpack it"):
        find_sources([tmp_path])
