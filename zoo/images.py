"""Pictures of any kind as 8-bit RGB: files, addresses, Pillow's modes, arrays; and files in folders and globs."""

import base64
import binascii
import glob
import http.client
import io
import os
import stat
import threading
import urllib.request
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError


# Formats that Pillow recognises by their first bytes but cannot decode.
MAX_DOWNLOAD = 256 << 20  # bytes that are read from an address
_NOT_DECODABLE = {"BUFR", "GRIB", "HDF5", "MPEG"}
_GRAYSCALE_16_BIT = {"PNG", "PPM"}  # formats whose mode "I" (32-bit integers) holds 16-bit values
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_warning_filters = threading.Lock()  # `warnings.catch_warnings` changes the whole process's filters


class ImageError(ValueError):
    """A path that no image can be read from.

    Args:
        path: The file, folder or glob.
        reason: What is wrong with it, in one line.
    """

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(path, reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def load_image(path: str | os.PathLike) -> Image.Image:
    """Read an image file as it is meant to be seen.

    Its EXIF orientation is applied, transparency becomes white, more than 8 bits per channel are scaled to 8, and only
    the first frame of an animation is read.

    Args:
        path: The image file.

    Returns:
        The image in mode `"RGB"`.

    Raises:
        ImageError: There is no such file, it is not an image, it is damaged, or it is larger than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    path = Path(path)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(path, "no such file") from error
    except (OSError, ValueError) as error:
        raise ImageError(path, getattr(error, "strerror", None) or str(error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(path, "is a folder, not an image file")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(path, "is not a regular file")
    if status.st_size == 0:
        raise ImageError(path, "the file is empty (0 bytes)")
    return _decode(path, path)


def decode_image(data: bytes, name: str | os.PathLike) -> Image.Image:
    """Read an image file that is in memory, as `load_image` does.

    Args:
        data: The file's content.
        name: Its name in errors.

    Returns:
        The image in mode `"RGB"`.

    Raises:
        ImageError: It is not an image, is damaged or too large.
    """
    if not data:
        raise ImageError(name, "the file is empty (0 bytes)")
    return _decode(io.BytesIO(data), name)


def _decode(file: Path | io.BytesIO, name: str | os.PathLike) -> Image.Image:
    try:
        with _open(file) as image:
            image.load()
            # Read after loading: TIFF applies its orientation by itself, and drops the tag.
            orientation = _orientation(image)
            rgb = to_rgb(image)
            rgb = image.copy() if rgb is image else rgb  # without the file
    except UnidentifiedImageError as error:
        raise ImageError(name, "not an image, or not in a format that Pillow can read") from error
    except PermissionError as error:
        raise ImageError(name, "permission denied") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(name, f"{error} Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS") from error
    except Exception as error:  # decoders of damaged files raise nearly anything: SyntaxError, struct.error, KeyError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(name, f"cannot be read as an image: {reason}") from error
    return rgb.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else rgb


def _open(file: Path | io.BytesIO) -> Image.Image:
    """Open, with Pillow's warning about decompression bombs as an error."""
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file)


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata say nothing about the pixels
        return None


def read_image(source: str | os.PathLike) -> Image.Image:
    """Read an image from wherever a text says that it is, as `load_image` does.

    Args:
        source: A file, an address (`http://`, `https://`), or the file's content in base64, with or without
            `data:image/...;base64,` before it.

    Returns:
        The image in mode `"RGB"`.

    Raises:
        ImageError: There is nothing, it is not an image, is damaged or too large.
    """
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        try:
            request = urllib.request.Request(text, headers={"User-Agent": "vlbridge"})
            with urllib.request.urlopen(request, timeout=60) as response:
                data = response.read(MAX_DOWNLOAD + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ImageError(text, f"cannot be fetched: {error}") from error
        if len(data) > MAX_DOWNLOAD:
            raise ImageError(text, f"has more than {MAX_DOWNLOAD >> 20} MiB; download it first, and pass the file")
        return decode_image(data, text)
    if os.path.exists(text) or not isinstance(source, str):
        return load_image(text)
    try:
        data = base64.b64decode("".join(text.partition(",")[2].split()) if text.startswith("data:") else text)
    except (binascii.Error, ValueError) as error:
        raise ImageError(text[:80], "no such file, and no picture in base64") from error
    return decode_image(data, text[:80])


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring a picture of any mode of Pillow to 8-bit RGB, see `load_image`.

    Args:
        image: The picture; its EXIF orientation is left as it is.

    Returns:
        The picture in mode `"RGB"`; itself if there is nothing to do.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _grayscale_to_8_bit(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _grayscale_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and floating point grayscale to 8 bits; Pillow's own conversion clips it to white."""
    whole = image.mode.startswith("I;16") or (image.mode == "I" and image.format in _GRAYSCALE_16_BIT)
    return Image.fromarray(_to_8_bit(np.asarray(image), 65535.0 if whole else None))


def _to_8_bit(values: np.ndarray, full: float | None = None) -> np.ndarray:
    """Scale values to 0..255.

    16-bit pictures are scaled by their full range. The range of the others is not stored: the smallest of 0..1
    (floats only), 0..255 and 0..65535 that holds all values is used, or else the range of the values themselves.
    """
    ranges = (1.0, 255.0, 65535.0) if np.issubdtype(values.dtype, np.floating) else (255.0, 65535.0)
    values = values.astype(np.float32)
    if full is not None:
        low, high = 0.0, full
    else:
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        for whole in ranges:
            if low >= 0 and high <= whole:
                low, high = 0.0, whole
                break
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    values = np.rint((values - low) * (255.0 / ((high - low) or 1.0)))
    return values.clip(0, 255).astype(np.uint8)


def array_to_rgb(
    array: np.ndarray | torch.Tensor, channels_first: bool | None = None, keep_colors: bool = False
) -> np.ndarray | torch.Tensor:
    """Bring a picture in an array or tensor to 8-bit RGB, as `to_rgb` does.

    `uint16` is scaled by its full range; for other types than `uint8` the smallest of 0..1 (floats only), 0..255 and
    0..65535 that holds all values is taken.

    Args:
        array: `(height, width)`, `(height, width, channels)` or `(channels, height, width)`, with 1 (grayscale), 2
            (with alpha), 3 (RGB) or 4 channels (with alpha).
        channels_first: Whether the channels come first; `None` finds out by the shape.
        keep_colors: Whether values are left alone, for callers that don't rescale: three channels are returned as they
            are, and floats stay within 0..1.

    Returns:
        Three channels in the same order of dimensions; the last one is that of the channels if there was none.

    Raises:
        ValueError: The shape is not a picture's, or values are negative.
    """
    shape = tuple(array.shape)
    if channels_first is None and len(shape) == 3:
        places = [first for first in (True, False) if shape[0 if first else -1] in (1, 3)]
        channels_first = [*places, *(first for first in (True, False) if shape[0 if first else -1] in (2, 4)), None][0]
    channels = 1 if len(shape) == 2 else shape[0 if channels_first else -1] if len(shape) == 3 else None
    if channels not in (1, 2, 3, 4) or (channels_first is None and len(shape) == 3):
        raise ValueError(
            f"An array of shape {shape} is no picture; expected (height, width), (height, width, channels) or "
            "(channels, height, width) with 1 to 4 channels."
        )
    kind = str(array.dtype).removeprefix("torch.")
    if channels == 3 and (keep_colors or kind == "uint8"):
        return array
    is_tensor = isinstance(array, torch.Tensor)
    values = array
    if is_tensor:  # numpy has no bfloat16
        values = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    if kind not in ("uint8", "bool") and values.size and (values < 0).any():
        raise ValueError(
            f"A picture has values down to {float(np.nanmin(values)):g}; expected 0..1, 0..255 or 0..65535. If it is "
            "normalised already, give it to the model as pixel_values."
        )
    if kind == "bool":
        values = values.astype(np.uint8) * 255
    elif kind != "uint8":
        values = _to_8_bit(values, 65535.0 if kind == "uint16" else None)
    if channels_first and len(shape) == 3:
        values = values.transpose(1, 2, 0)
    if channels == 1:
        values = values.reshape(values.shape[:2])
    rgb = np.array(to_rgb(Image.fromarray(np.ascontiguousarray(values))))
    if channels_first:
        rgb = np.ascontiguousarray(rgb.transpose(2, 0, 1))
    if keep_colors and ("float" in kind):
        rgb = rgb.astype(np.float32) / 255.0
    return torch.from_numpy(rgb).to(array.device) if is_tensor else rgb


@cache
def _image_extensions() -> frozenset[str]:
    extensions = Image.registered_extensions()
    return frozenset(
        extension for extension, name in extensions.items() if name in Image.OPEN and name not in _NOT_DECODABLE
    )


def expand_paths(patterns: Iterable[str | os.PathLike], recursive: bool = False) -> list[Path]:
    """Turn files, folders and globs into a list of files.

    A file is taken whatever its extension, and so are the files that a glob matches, as if the shell had expanded it.
    From a folder, the files with the extension of an image format are taken, except hidden files and folders.

    Args:
        patterns: Files, folders and globs (`*`, `?`, `[...]`, and `**` for any depth).
        recursive: Look into subfolders too.

    Returns:
        The files: in the order of `patterns`, sorted within a folder or glob, each file once.

    Raises:
        ImageError: A path does not exist, a folder holds no image, or a glob matches no file.
    """
    if isinstance(patterns, (str, os.PathLike)):
        patterns = [patterns]
    files = {}
    for pattern in patterns:
        for file in _expand(os.path.expanduser(pattern), recursive):
            files.setdefault(os.path.abspath(file), Path(file))
    return list(files.values())


def _expand(pattern: str, recursive: bool) -> list[str]:
    if os.path.isdir(pattern):
        files = _images_in_folder(pattern, recursive)
        if not files:
            hint = "" if recursive else ", not counting its subfolders"
            raise ImageError(pattern, f"no image files in this folder{hint}")
        return sorted(files)
    if os.path.exists(pattern):  # before globs: a file may be called "img[1].jpg"
        return [pattern]
    if not glob.has_magic(pattern):
        raise ImageError(pattern, "no such file or folder")
    files = [match for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]
    if not files:
        raise ImageError(pattern, "no file matches this pattern")
    return sorted(files)


def _images_in_folder(folder: str, recursive: bool) -> list[str]:
    def refuse(error: OSError):
        raise ImageError(error.filename or folder, f"cannot be listed: {error.strerror}") from error

    files = []
    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")] if recursive else []
        files += [
            os.path.join(parent, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in _image_extensions()
        ]
    return files


__all__ = ["ImageError", "array_to_rgb", "decode_image", "expand_paths", "load_image", "read_image", "to_rgb"]
