"""`vlbridge.images`: every mode of image file becomes the RGB image that a person would see."""

import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from vlbridge.images import ImageError, expand_paths, load_image


GRADIENT = np.arange(256, dtype=np.uint16).reshape(4, 64) * 257  # 0..65535: the 8-bit value times 257
EIGHT_BIT = np.arange(256, dtype=np.uint8).reshape(4, 64)


def colours(height: int = 2, width: int = 3) -> np.ndarray:
    """A different colour in every pixel."""
    return np.random.default_rng(0).permutation(256)[: height * width * 3].reshape(height, width, 3).astype(np.uint8)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def check_gray(path: Path, expected: np.ndarray) -> None:
    """The image at `path` is gray, and its values are these."""
    image = load_image(path)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    np.testing.assert_array_equal(pixels, np.repeat(np.asarray(expected)[..., None], 3, axis=2))


class TestModes:
    def test_rgb_is_unchanged(self, tmp_path):
        Image.fromarray(colours()).save(tmp_path / "a.png")
        image = load_image(str(tmp_path / "a.png"))
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), colours())

    @pytest.mark.parametrize("name", ["a.png", "a.tif", "big_endian.tif", "a.pgm"])
    def test_16_bit_gradient_keeps_its_gradient(self, tmp_path, name):
        path = tmp_path / name
        if name == "a.pgm":
            path.write_bytes(b"P5 64 4 65535\n" + GRADIENT.astype(">u2").tobytes())
        else:
            Image.fromarray(GRADIENT.astype(">u2") if "big" in name else GRADIENT).save(path)
        check_gray(path, EIGHT_BIT)

    def test_dark_16_bit_image_stays_dark(self, tmp_path):
        Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)).save(tmp_path / "a.png")
        check_gray(tmp_path / "a.png", np.full((2, 2), 1))

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (EIGHT_BIT.astype(np.int32), EIGHT_BIT),
            (GRADIENT.astype(np.int32), EIGHT_BIT),
            (GRADIENT.astype(np.int32) * 1000, EIGHT_BIT),
            (GRADIENT.astype(np.int32) - 32768, EIGHT_BIT),
            (EIGHT_BIT.astype(np.float32) / 255, EIGHT_BIT),
            (EIGHT_BIT.astype(np.float32), EIGHT_BIT),
            (GRADIENT.astype(np.float32), EIGHT_BIT),
            (EIGHT_BIT.astype(np.float32) * 1e6 - 1e7, EIGHT_BIT),
            (np.full((2, 2), 1e7, np.float32), np.zeros((2, 2))),
            (np.array([[0, 1, np.nan, np.inf]], np.float32), np.array([[0, 255, 0, 255]])),
            (np.full((2, 2), np.nan, np.float32), np.zeros((2, 2))),
        ],
        ids=["int 8", "int 16", "int 32", "signed", "0..1", "0..255", "0..65535", "any", "flat", "nan", "only nan"],
    )
    def test_32_bit_and_float(self, tmp_path, values, expected):
        Image.fromarray(values).save(tmp_path / "a.tif")
        with Image.open(tmp_path / "a.tif") as stored:
            assert stored.mode in ("I", "F")
        check_gray(tmp_path / "a.tif", expected)

    def test_1_bit(self, tmp_path):
        Image.fromarray(np.array([[True, False, True]])).save(tmp_path / "a.png")
        check_gray(tmp_path / "a.png", np.array([[255, 0, 255]]))

    def test_cmyk(self, tmp_path):
        inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], dtype=np.uint8)
        Image.frombytes("CMYK", (4, 1), inks.tobytes()).save(tmp_path / "a.tif")
        expected = [[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0]]
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.tif"))[0], expected)
        Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
        np.testing.assert_allclose(
            np.asarray(load_image(tmp_path / "a.jpg"))[8, 8], [255, 0, 0], atol=3
        )  # JPEG is lossy

    def test_rgba_lies_on_white(self, tmp_path):
        pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        expected = [[255, 0, 0], [255, 255, 255], [127, 127, 127]]  # 255 * (1 - 128 / 255) = 127
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png"))[0], expected)

    def test_la_lies_on_white(self, tmp_path):
        Image.frombytes("LA", (3, 1), bytes([10, 255, 10, 0, 0, 128])).save(tmp_path / "a.png")
        check_gray(tmp_path / "a.png", np.array([[10, 255, 127]]))

    @pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])], ids=["one colour", "alpha per colour"])
    def test_palette_with_transparency_lies_on_white(self, tmp_path, transparency):
        image = Image.new("P", (3, 1))
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 0])
        image.putdata([0, 1, 2])
        image.save(tmp_path / "a.png", transparency=transparency)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pixels = np.asarray(load_image(tmp_path / "a.png"))
        last = [0, 0, 0] if transparency == 1 else [127, 127, 127]
        np.testing.assert_array_equal(pixels[0], [[255, 0, 0], [255, 255, 255], last])

    def test_transparent_colour_of_rgb_lies_on_white(self, tmp_path):
        Image.fromarray(np.array([[[1, 2, 3], [9, 8, 7]]], np.uint8)).save(tmp_path / "a.png", transparency=(1, 2, 3))
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png"))[0], [[255, 255, 255], [9, 8, 7]])

    @pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
    def test_first_frame_of_an_animation(self, tmp_path, name):
        if name == "a.webp" and not features.check("webp"):
            pytest.skip("this Pillow has no WebP")
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, **options)
        with Image.open(tmp_path / name) as stored:
            assert stored.n_frames == 3
        assert load_image(tmp_path / name).getpixel((4, 4)) == (255, 0, 0)


class TestOrientation:
    # What EXIF 2.32 says of rows and columns, as numpy operations.
    UPRIGHT = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_all_eight(self, tmp_path, orientation, suffix):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(colours()).save(path, exif=exif(orientation))
        expected = self.UPRIGHT[orientation](colours())
        image = load_image(path)
        assert image.size == ((2, 3) if orientation >= 5 else (3, 2))
        np.testing.assert_array_equal(np.asarray(image), expected)

    def test_jpeg_of_a_phone_held_upright(self, tmp_path):
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:16, :16] = [255, 0, 0]  # stored top left, seen top right
        Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, exif=exif(6))
        image = load_image(tmp_path / "a.jpg")
        assert image.size == (32, 64)
        seen = np.asarray(image)[..., 0] > 128
        assert seen[4:12, 20:28].all() and not seen[:, :15].any() and not seen[17:].any()

    @pytest.mark.parametrize("bad", [exif(9).tobytes(), b"Exif\0\0MM\0*\0\0\0\x08\0\x09", b"Exif\0\0what is this"])
    def test_damaged_exif_does_not_lose_the_image(self, tmp_path, bad):
        Image.fromarray(colours()).save(tmp_path / "a.png", exif=bad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), colours())


class TestErrors:
    def refused(self, path, match: str) -> ImageError:
        with pytest.raises(ImageError, match=match) as caught:
            load_image(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        return caught.value

    def test_missing(self, tmp_path):
        self.refused(tmp_path / "a.jpg", "no such file")
        (tmp_path / "file").write_bytes(b"x")
        self.refused(tmp_path / "file" / "a.jpg", "no such file")
        self.refused(tmp_path / ("a" * 5000), "too long")

    def test_folder(self, tmp_path):
        self.refused(tmp_path, "is a folder")

    def test_empty(self, tmp_path):
        (tmp_path / "a.jpg").touch()
        self.refused(tmp_path / "a.jpg", "empty")

    def test_text(self, tmp_path):
        (tmp_path / "a.jpg").write_text("This is not a photograph.\n")
        self.refused(tmp_path / "a.jpg", "not an image")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
    def test_pipe_does_not_hang(self, tmp_path):
        os.mkfifo(tmp_path / "a.jpg")
        self.refused(tmp_path / "a.jpg", "not a regular file")

    @pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "bmp", "webp"])
    def test_truncated(self, tmp_path, suffix):
        if suffix == "webp" and not features.check("webp"):
            pytest.skip("this Pillow has no WebP")
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        self.refused(path, "cannot be read|not an image")
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False

    @pytest.mark.parametrize("limit", [60, 40], ids=["warning", "error"])
    def test_decompression_bomb(self, tmp_path, monkeypatch, limit):
        Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow warns above it, and raises above twice as much
        filters = list(warnings.filters)
        self.refused(tmp_path / "a.png", "100 pixels.* Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS")
        assert warnings.filters == filters
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert load_image(tmp_path / "a.png").size == (10, 10)

    def test_error_survives_pickling(self, tmp_path):
        """Data loaders' workers send their errors."""
        error = self.refused(tmp_path / "a.jpg", "no such file")
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.path, again.reason) == (str(error), error.path, error.reason)


class TestExpandPaths:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("b.jpg", "a.PNG", "notes.txt", "data.h5", ".hidden.jpg", "sub/c.webp", "sub/d.md", ".cache/e.jpg"):
            path = tmp_path / "pictures" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / "empty").mkdir()
        return Path("pictures")

    def test_folder(self, folder):
        assert expand_paths([folder]) == [folder / "a.PNG", folder / "b.jpg"]

    def test_folder_recursive(self, folder):
        assert expand_paths([str(folder)], recursive=True) == [
            folder / "a.PNG",
            folder / "b.jpg",
            folder / "sub" / "c.webp",
        ]

    def test_glob(self, folder):
        assert expand_paths(["pictures/*.jpg"]) == [folder / "b.jpg"]
        assert expand_paths(["pictures/**/*.[jw]*"]) == [folder / "b.jpg", folder / "sub" / "c.webp"]

    def test_explicit_files_and_globs_may_have_any_extension(self, folder):
        assert expand_paths(["pictures/notes.txt", "pictures/d*"]) == [folder / "notes.txt", folder / "data.h5"]

    def test_each_file_once_in_the_order_of_the_arguments(self, folder):
        patterns = ["pictures/b.jpg", "./pictures/b.jpg", "pictures", "pictures/*.PNG", "pictures/sub/../a.PNG"]
        assert expand_paths(patterns) == [folder / "b.jpg", folder / "a.PNG"]

    def test_one_path_is_a_list_of_one(self, folder):
        assert expand_paths("pictures/b.jpg") == expand_paths(folder / "b.jpg") == [folder / "b.jpg"]

    def test_a_file_named_like_a_glob(self, folder):
        (folder / "img[1].jpg").touch()
        assert expand_paths(["pictures/img[1].jpg"]) == [folder / "img[1].jpg"]

    def test_home(self, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder.absolute()))
        monkeypatch.setenv("USERPROFILE", str(folder.absolute()))
        assert expand_paths(["~/*.jpg"]) == [folder.absolute() / "b.jpg"]

    @pytest.mark.parametrize(
        ("pattern", "match"),
        [
            ("nowhere.jpg", "nowhere.jpg: no such file or folder"),
            ("empty", "empty: no image files in this folder, not counting"),
            ("pictures/*.gif", r"pictures/\*.gif: no file matches"),
            ("pictures/su*", "no file matches"),
        ],
    )
    def test_nothing_found(self, folder, pattern, match):
        with pytest.raises(ImageError, match=match):
            expand_paths(["pictures/b.jpg", pattern])

    def test_recursive_nothing_found_says_nothing_of_subfolders(self, folder):
        with pytest.raises(ImageError, match="no image files in this folder$"):
            expand_paths(["empty"], recursive=True)
