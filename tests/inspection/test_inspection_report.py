"""The report: one page that needs no network, and fits a phone; pictures with weights over them."""

from __future__ import annotations

import builtins
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import COMBINATIONS, tiny_image, tiny_model

from vlbridge.inspection import inspection_drawing as drawing
from vlbridge.inspection.inspection_budget import example_configs, token_budget
from vlbridge.inspection.inspection_geometry import Grid
from vlbridge.inspection.inspection_report import finding_lines, inspect_model, report_html


CHROMIUM = next(
    (path for name in ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
     if (path := shutil.which(name))), None,
)  # fmt: skip


class Page(HTMLParser):
    """The tags of a page; every one that is opened must be closed."""

    EMPTY = {"meta", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def found_by(bridge, language="llama", occluded=False, **options):
    model, processor = tiny_model(bridge, language, **options)
    pictures = {"one & two.png": tiny_image(0, (60, 40)), "<b>.png": tiny_image(1, (60, 40))}
    found = inspect_model(model, processor, "models/<i>", pictures, "what & where?", "ab <c>", with_occlusion=occluded)
    return found, processor


@pytest.mark.core
@pytest.mark.parametrize(("bridge", "language"), COMBINATIONS)
def test_a_page_of_every_family(bridge, language):
    found, processor = found_by(bridge, language)
    text = report_html(found)
    page = Page(text)
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    words, queries = 2 * 2, {"mlp": 0, "qformer": 2 * 5, "perceiver": 2 * 6}[bridge]
    assert len(images) == 2 + words + queries + bool(queries)
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert "&lt;b&gt;.png" in text and "one &amp; two.png" in text and "what &amp; where?" in text
    assert "width=device-width" in text
    facts = found.to_dict()
    assert [word["word"] for word in facts["pictures"][0]["words"]] == ["ab", "<c>"]
    assert bool(facts["gates"]) == (bridge == "perceiver") and ("Gates" in text) == (bridge == "perceiver")
    assert (facts["specialisation"] is None) == (bridge == "mlp")
    lines = list(finding_lines(found))
    assert "one & two.png: what & where? -> ab <c>" in lines
    assert len([line for line in lines if line.startswith("ab ")]) == 2


def test_a_page_of_any_resolution_with_occlusion():
    found, _ = found_by("mlp", image_aspect_ratio="anyres", occluded=True)
    (first, _) = found.pictures
    assert first.occlusion.drop.shape == (5, 5) and len(first.grids) == 2
    assert "what the answer depends on" in report_html(found)
    assert found.to_dict()["pictures"][0]["occlusion"]["drop"] == first.occlusion.drop.tolist()


def test_without_pictures_there_are_gates_and_budget():
    model, processor = tiny_model("perceiver")
    found = inspect_model(model, processor, "m", {}, measure=True)
    text = report_html(found)
    assert "Gates" in text and "Context window" in text and found.pictures == found.measured == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")
def test_a_phone_shows_all_of_it(tmp_path):
    """In a headless browser, 390 pixels wide: nothing reaches beyond the screen, and all pictures are shown."""
    found, _ = found_by("perceiver")
    (tmp_path / "report.html").write_text(report_html(found), encoding="utf-8")
    probe = (
        "<script>addEventListener('load',()=>{let p=[...document.images];document.title='W'+document.documentElement."
        "scrollWidth+' I'+innerWidth+' N'+p.filter(i=>i.complete&&i.naturalWidth>0&&i.getBoundingClientRect().right<="
        "innerWidth).length+'/'+p.length})</script></body>"
    )
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "probed.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,844", "--dump-dom"]
    # the smallest window of a browser may be 500 pixels wide: a frame is as narrow as a phone
    frame = '<title></title><iframe id="f" src="probed.html" width="390" height="800" style="border:0"></iframe>'
    frame += "<script>addEventListener('load',()=>{document.title=f.contentDocument.title})</script>"
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    done = subprocess.run(
        [*command, "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=5000", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>W(\d+) I(\d+) N(\d+)/(\d+)</title>", done.stdout)
    assert title, done.stdout[:500] + done.stderr[-2000:]
    width, screen, shown, images = map(int, title.groups())
    assert screen == 390 and width <= 390 and shown == images > 10


# ---------------------------------------------------------------------- drawing


def test_overlays_are_bright_where_the_weight_is():
    picture = Image.new("RGB", (40, 20), (90, 90, 90))
    grid = Grid((10.0, 0.0, 30.0, 20.0), torch.arange(4).unflatten(0, (2, 2)))
    drawn = np.asarray(drawing.overlay(picture, torch.tensor([0.0, 0.0, 0.0, 1.0]), [grid], smooth=False)).astype(int)
    assert drawn.shape == (20, 40, 3)
    assert drawn[15, 25].sum() > drawn[5, 15].sum() + 200
    assert drawn[5, 2].tolist() == [31, 31, 31]  # cropped away: a third as bright
    nothing = np.asarray(drawing.overlay(picture, torch.tensor([-1.0] * 4), [grid]))
    assert len(set(map(tuple, nothing[:, 12:28].reshape(-1, 3).tolist()))) == 1


def test_matrices_keep_their_order():
    drawn = np.asarray(drawing.matrix(torch.tensor([[0.0, 1.0], [0.5, 0.0]]), side=8)).astype(int)
    assert drawn.shape == (8, 8, 3)
    assert drawn[1, 6].sum() > drawn[6, 1].sum() > drawn[1, 1].sum()


def figures():
    history = [{"step": step, "layer": layer, "attention": 0.1 * step, "feed_forward": 0.0}
               for step in (0, 5) for layer in (0, 3)]  # fmt: skip
    grid = Grid((0.0, 0.0, 40.0, 20.0), torch.arange(4).unflatten(0, (2, 2)))
    return {
        "gates": lambda: drawing.draw_gates(history, marks={"names colours": 3}),
        "similarity": lambda: drawing.draw_similarity(torch.eye(3)),
        "maps": lambda: drawing.draw_maps(
            tiny_image(0, (40, 20)), torch.rand(3, 4), [grid], ["a", "b", "c"], columns=2
        ),
        "budget": lambda: drawing.draw_budget(token_budget(example_configs(), turns=3)),
    }


@pytest.mark.parametrize("name", ["gates", "similarity", "maps", "budget"])
def test_figures(name, tmp_path):
    figure = figures()[name]()
    figure.savefig(tmp_path / "figure.png")
    assert np.asarray(Image.open(tmp_path / "figure.png")).std() > 5
    axes = figure.axes
    if name == "gates":
        assert [line.get_ydata()[1] for line in axes[0].lines[:2]] == [0.5, 0.5]
        assert any(text.get_text() == "names colours" for text in axes[0].texts)
    if name == "budget":
        assert [line.get_ydata()[0] for line in axes[0].lines[:5]] == [8192 - 100 - n for n in (196, 576, 2928, 1, 32)]
    if name == "maps":
        assert [each.get_title() for each in axes] == ["a", "b", "c", ""]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "vlbridge\[inspect\]"'):
        drawing.draw_similarity(torch.eye(2))


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no gates"):
        drawing.draw_gates([])
    with pytest.raises(ValueError, match="2 maps and 1 titles"):
        drawing.draw_maps(tiny_image(), torch.rand(2, 4), [], ["a"])
    with pytest.raises(ValueError, match="context window"):
        drawing.draw_budget([{"model": "a", "turn": 1, "left": None}])
