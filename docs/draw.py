"""Draw the pictures of the README and of the documentation.

python docs/draw.py              # images/bridges-light.svg and images/bridges-dark.svg
python docs/draw.py terminal     # images/terminal.svg: runs the commands that it shows
"""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape


ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
COLOURS = {
    "light": {"ink": "#1f2328", "soft": "#57606a", "frozen": "#e7edf4", "edge": "#8c98a5", "bridge": "#d1570b",
              "on_bridge": "#ffffff", "text": "#9aa6b2", "line": "#57606a"},
    "dark": {"ink": "#e6edf3", "soft": "#a6b0ba", "frozen": "#2a323c", "edge": "#6b7681", "bridge": "#f0883e",
             "on_bridge": "#1b1108", "text": "#6b7681", "line": "#a6b0ba"},
}  # fmt: skip
EXAMPLE, PHOTOGRAPH = "zoo/assets/example.png", "zoo/assets/photograph.jpg"
COMMANDS = [
    ["caption", EXAMPLE],
    ["caption", PHOTOGRAPH],
    ["ask", EXAMPLE, "what color is the shape?"],
    ["ask", PHOTOGRAPH, "is there a dog in the image?"],
]


class Drawing:
    """Elements of an SVG file in the colours of a theme."""

    def __init__(self, theme: str, width: int, height: int, title: str):
        self.colour, self.elements = COLOURS[theme], []
        self.size, self.title = (width, height), title

    def box(self, x, y, width, height, fill, edge=None, radius=6):
        """A box with round corners, in colours of the theme."""
        stroke = f' stroke="{self.colour[edge]}"' if edge else ""
        self.elements.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" '
            f'fill="{self.colour[fill]}"{stroke}/>'
        )

    def text(self, x, y, words, colour="ink", size=13, weight=400, anchor="middle"):
        """A line of text."""
        self.elements.append(
            f'<text x="{x}" y="{y}" fill="{self.colour[colour]}" font-size="{size}" font-weight="{weight}" '
            f'text-anchor="{anchor}">{escape(words)}</text>'
        )

    def arrow(self, *points, colour="line"):
        """A line through points that ends in a head, whose direction is that of the last piece."""
        (x0, y0), (x1, y1) = points[-2:]
        along = ((x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0))
        across = (along[1], along[0])
        base = (x1 - 7 * along[0], y1 - 7 * along[1])
        corners = [base[i] + 4 * across[i] for i in (0, 1)], [base[i] - 4 * across[i] for i in (0, 1)]
        line = " ".join(f"{x},{y}" for x, y in (*points[:-1], base))
        head = " ".join(f"{x},{y}" for x, y in ((x1, y1), *corners))
        self.elements.append(
            f'<polyline points="{line}" fill="none" stroke="{self.colour[colour]}" stroke-width="1.5"/>'
            f'<polygon points="{head}" fill="{self.colour[colour]}"/>'
        )

    def svg(self) -> str:
        """The file's text."""
        width, height = self.size
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'font-family="{SANS}" role="img">',
                f"<title>{escape(self.title)}</title>",
                *self.elements,
                "</svg>\n",
            ]
        )


def prompt_row(drawing: Drawing, x: int, y: int, visual: int, text: int) -> None:
    """A prompt as a row of squares: visual tokens in the bridge's colour, then tokens of text."""
    for number in range(visual + text):
        drawing.box(x + 11 * number, y, 9, 9, "bridge" if number < visual else "text", radius=2)


def layers(drawing: Drawing, x: int, y: int, width: int) -> list[float]:
    """Decoder layers with gated cross-attention before each; the heights at which the cross-attention is entered."""
    entries = []
    for number in range(2):
        top = y + 50 * (1 - number)
        drawing.box(x, top + 22, width, 18, "bridge", radius=4)
        drawing.text(x + width / 2, top + 35, "gated cross-attention", "on_bridge", 12, 600)
        drawing.box(x, top, width, 18, "frozen", "edge", radius=4)
        drawing.text(x + width / 2, top + 13, "layer", "soft", 12)
        entries.append(top + 31)
    return entries


def bridges(theme: str) -> str:
    """The three bridges between a vision encoder and a language model."""
    drawing = Drawing(theme, 540, 424, "Three bridges between a frozen vision encoder and a frozen language model")
    tops, height = (34, 152, 270), 102
    drawing.text(58, 22, "frozen", "soft", 12)
    drawing.text(216, 22, "trained", "bridge", 12, 600)
    drawing.text(426, 22, "frozen", "soft", 12)
    drawing.box(8, 34, 100, tops[-1] + 146 - 34, "frozen", "edge")
    for line, words in enumerate(("vision", "encoder")):
        drawing.text(58, 168 + 17 * line, words, weight=600)
    for line, words in enumerate(("CLIP, SigLIP,", "DINOv2,", "ResNet, ...")):
        drawing.text(58, 214 + 16 * line, words, "soft", 12)
    rows = (
        ("MLP", "one token per patch", "LLaVA-1.5: 576", 10, "language model"),
        ("Q-Former", "a few query tokens", "BLIP-2: 32", 3, "language model (also T5)"),
        ("Perceiver", "a few latents", "Flamingo: 64", 0, "language model"),
    )
    for top, (name, what, example, visual, language) in zip(tops, rows, strict=True):
        tall = height + 44 * (not visual)
        middle = top + height / 2
        drawing.arrow((110, middle), (142, middle))
        drawing.box(144, top + 10, 144, height - 20, "bridge")
        drawing.text(216, top + 36, name, "on_bridge", 16, 700)
        drawing.text(216, top + 57, what, "on_bridge", 12.5)
        drawing.text(216, top + 75, example, "on_bridge", 12.5)
        drawing.box(320, top, 212, tall, "frozen", "edge")
        drawing.text(426, top + 22, language, weight=600)
        if visual:
            drawing.arrow((290, middle), (318, middle))
            prompt_row(drawing, 332, top + 42, visual, 17 - visual)
            drawing.text(426, top + 72, "visual tokens stand in the", "soft", 12)
            drawing.text(426, top + 88, "prompt, before the question", "soft", 12)
        else:
            for entry in layers(drawing, 352, top + 34, 168):
                drawing.arrow((290, middle), (306, middle), (306, entry), (350, entry))
            prompt_row(drawing, 332 + 22, top + 132, 0, 15)
    return drawing.svg()


def terminal() -> str:
    """A terminal with the commands of the README, run now, and the pictures that they are about."""
    lines = []
    for arguments in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "vlbridge_cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        words = " ".join(f'"{word}"' if " " in word else word for word in arguments)
        lines += [("command", f"vlbridge {words}"), ("answer", done.stdout.strip())]
    pictures = [base64.b64encode((ROOT / file).read_bytes()).decode() for file in (EXAMPLE, PHOTOGRAPH)]
    height = 72 + 24 * len(lines)
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 784 {height}" font-family="{MONO}" font-size="14" role="img">',
        "<title>vlbridge captions a drawing and a photograph, and answers questions about them</title>",
        f'<rect width="784" height="{height}" rx="10" fill="#161b22" stroke="#444c56"/>',
        *(f'<circle cx="{x}" cy="18" r="5.5" fill="{colour}"/>'
          for x, colour in ((20, "#ff5f57"), (38, "#febc2e"), (56, "#28c840"))),
        f'<image x="672" y="34" width="92" height="92" xlink:href="data:image/png;base64,{pictures[0]}"/>',
        f'<image x="672" y="138" width="92" height="92" xlink:href="data:image/jpeg;base64,{pictures[1]}"/>',
    ]  # fmt: skip
    for number, (kind, words) in enumerate(lines):
        y = 56 + 24 * number
        if kind == "command":
            elements.append(f'<text x="20" y="{y}" fill="#7ee787">$</text>')
        x, colour = (36, "#e6edf3") if kind == "command" else (20, "#ffa657")
        elements.append(f'<text x="{x}" y="{y}" fill="{colour}" xml:space="preserve">{escape(words)}</text>')
    return "\n".join([*elements, "</svg>\n"])


def main() -> None:
    """Write the pictures that the command line asks for."""
    IMAGES.mkdir(exist_ok=True)
    if sys.argv[1:] == ["terminal"]:
        (IMAGES / "terminal.svg").write_text(terminal(), encoding="utf-8")
        return
    for theme in COLOURS:
        (IMAGES / f"bridges-{theme}.svg").write_text(bridges(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
