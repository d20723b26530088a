"""Contact sheets: pictures of records with their texts, to look a data set over."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..images import ImageError
from .training_records import kind_of, open_image


@dataclass
class Cell:
    """A record on a contact sheet.

    Args:
        images: Its first images, small; `None` for one that can't be opened.
        more: Number of further images.
        text: What the record says.
        problem: What is wrong with it.
    """

    images: list[Image.Image | None]
    more: int
    text: str
    problem: str | None = None

    @classmethod
    def of(cls, record: dict, problem: str | None, side: int = 256, most: int = 4) -> Cell:
        """Make a cell of a record.

        Args:
            record: The record.
            problem: What is wrong with it.
            side: Largest side of its images, in pixels.
            most: Number of images that are shown.
        """
        images = []
        for value in record["images"][:most]:
            try:
                image = open_image(value)
                image.thumbnail((side, side))
                images.append(image)
            except ImageError:
                images.append(None)
        try:
            text = _cell_text(record)
        except ValueError:  # of no kind; the problem says so
            text = ""
        return cls(images, max(0, len(record["images"]) - most), f"{record['id']}  {text}", problem)


def _cell_text(record: dict) -> str:
    kind = kind_of(record)
    if kind == "messages":
        names = {"user": "Q", "assistant": "A", "system": "S"}
        return "\n".join(
            f"{names.get(message['role'], message['role'])}: {_with_places(message['content'])}"
            for message in record["messages"]
        )
    if kind is None:
        return f"label {record['label']}"
    return record["caption"] or "" if kind == "caption" else _with_places(record["document"])


def _with_places(content: list[dict]) -> str:
    return " ".join("[image]" if item["type"] == "image" else item["text"] or "" for item in content)


def contact_sheet(cells: list[Cell], columns: int = 4, width: int = 260, text_lines: int = 6) -> Image.Image:
    """A picture of records: their images with the texts beneath; broken records have a red frame.

    Args:
        cells: Cells from `check_data`.
        columns: Number of cells in a row.
        width: Width of a cell, in pixels.
        text_lines: Number of lines of text per cell.

    Raises:
        ValueError: There is nothing to show.
    """
    if not cells:
        raise ValueError("there are no records to show.")
    font = _font(13)
    line, border = 17, 8
    height = width + line * (text_lines + 1)
    rows = -(-len(cells) // columns)
    sheet = Image.new(
        "RGB", (min(columns, len(cells)) * (width + border) + border, rows * (height + border) + border), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for number, cell in enumerate(cells):
        left = border + number % columns * (width + border)
        top = border + number // columns * (height + border)
        _draw_images(sheet, draw, cell, left, top, width)
        if cell.problem is not None:
            draw.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), outline="red", width=3)
        lines = [("red", text) for text in _wrapped(cell.problem or "", font, width, 2)]
        lines += [("black", text) for text in _wrapped(cell.text, font, width, text_lines + 1 - len(lines))]
        for index, (color, text) in enumerate(lines):
            draw.text((left, top + width + 2 + line * index), text, fill=color, font=font)
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    """A font of this machine with many characters, or Pillow's own, which has little beyond ASCII."""
    for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _draw_images(sheet, draw, cell: Cell, left: int, top: int, width: int) -> None:
    across = 1 if len(cell.images) <= 1 else 2
    side = width // across
    for number, image in enumerate(cell.images):
        x, y = left + number % across * side, top + number // across * side
        if image is None:
            draw.rectangle((x, y, x + side - 1, y + side - 1), fill="mistyrose")
            draw.line((x, y, x + side - 1, y + side - 1), fill="red", width=3)
            draw.line((x, y + side - 1, x + side - 1, y), fill="red", width=3)
        else:
            image = image.copy()
            image.thumbnail((side - 2, side - 2))
            sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))
    if not cell.images:
        draw.rectangle((left, top, left + width - 1, top + width - 1), fill="whitesmoke")
        draw.text((left + width // 2, top + width // 2), "no image", fill="gray", anchor="mm")
    if cell.more:
        draw.text((left + width - 4, top + width - 4), f"+ {cell.more}", fill="red", anchor="rs")


def _wrapped(text: str, font, width: int, most: int) -> list[str]:
    """Lines that fit a width in pixels, `most` of them; the last ends in dots if there is more."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        current = ""
        for word in paragraph.split():
            while font.getlength(word) > width:  # longer than a line: cut
                cut = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                lines += [current] if current else []
                lines.append(word[:cut])
                current, word = "", word[cut:]
            longer = f"{current} {word}".strip()
            if font.getlength(longer) <= width:
                current = longer
            else:
                lines.append(current)
                current = word
            if len(lines) > most:
                break
        lines += [current] if current else []
        if len(lines) > most:
            break
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1][:-3]}..."] if most > 0 else []
    return lines


__all__ = ["Cell", "contact_sheet"]
