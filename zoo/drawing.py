"""What reports are made of: pages of HTML that need nothing else, no network, no scripts; figures of matplotlib."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image


LONGEST_SIDE = 480  # pixels of the pictures on a page
# Colours from nothing to most: black, violet, red, orange, pale yellow
COLORS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:60rem;padding:0 1rem 3rem;color:#222;background:#fff}
h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.2rem;border-top:1px solid #ccc;padding-top:1rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #eee}th:first-child,td:first-child{text-align:left}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:.6rem}
.small{grid-template-columns:repeat(auto-fill,minmax(4.5rem,1fr))}
figure{margin:0}figcaption{font-size:.85rem;overflow-wrap:anywhere}img{width:100%;display:block}
.wide img{max-width:22rem}.bar{display:inline-block;height:.7rem;background:#bc3754;vertical-align:middle}
.note{color:#555;font-size:.9rem}
"""


def colored(values: np.ndarray) -> np.ndarray:
    """Colours of numbers from 0 to 1, `(..., 3)` of 0 to 255.

    Args:
        values: `(...)`.
    """
    steps = np.linspace(0, 1, len(COLORS))
    channels = [np.interp(values, steps, [color[channel] for color in COLORS]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def empty_figure(width: float, height: float):
    """An empty figure of matplotlib.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'{error}; figures need matplotlib: pip install "vlbridge[inspect]"') from error
    return Figure(figsize=(width, height), layout="constrained")


# ---------------------------------------------------------------------- HTML


def cell(value) -> str:
    """A value as text: three digits behind the point, commas, nothing for `None`."""
    if value is None:
        return ""
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def picture_html(picture: Image.Image, caption: str, kind: str = "", longest_side: int = LONGEST_SIDE) -> str:
    """A picture within a page.

    Args:
        picture: The picture.
        caption: What stands below it.
        kind: Its class in `STYLE`.
        longest_side: In pixels; larger ones are made smaller.
    """
    scale = min(1.0, longest_side / max(picture.size))
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    buffer = io.BytesIO()
    picture.convert("RGB").resize(size).save(buffer, "PNG", optimize=True)
    return png_html(buffer.getvalue(), caption, kind, size)


def png_html(content: bytes, caption: str, kind: str, size: tuple[int, int]) -> str:
    """A PNG file's content within a page.

    Args:
        content: The file's bytes.
        caption: What stands below it.
        kind: Its class in `STYLE`.
        size: Width and height, in pixels.
    """
    data, caption = base64.b64encode(content).decode(), html.escape(caption)
    return (
        f'<figure class="{kind}"><img alt="{caption}" width="{size[0]}" height="{size[1]}" style="height:auto" '
        f'src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def table_html(rows: Sequence[dict], columns: Sequence[str], bar: str | None = None) -> str:
    """A table.

    Args:
        rows: Dicts.
        columns: Their keys to show.
        bar: A column of numbers from -1 to 1 that are drawn too.
    """
    head = "".join(f"<th>{html.escape(column.replace('_', ' '))}</th>" for column in columns) + "<th></th>" * bool(bar)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell(row.get(column)))}</td>" for column in columns)
        if bar:
            width = min(abs(row[bar] or 0.0), 1.0) * 6
            cells += f'<td style="text-align:left"><span class="bar" style="width:{width:.2f}rem"></span></td>'
        body += f"<tr>{cells}</tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def page_html(title: str, parts: Iterable[str], refresh: int | None = None) -> str:
    """A page.

    Args:
        title: Its title.
        parts: HTML of its parts.
        refresh: Seconds after which a browser reads the file again.
    """
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh}">'
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>{html.escape(title)}</title><style>{STYLE}</style></head>'
        f"<body>{chr(10).join(parts)}</body></html>\n"
    )


__all__ = ["cell", "colored", "empty_figure", "page_html", "picture_html", "png_html", "table_html"]
