"""The page of an evaluation: what it says, that nothing escapes it, and how a real browser shows it."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from retinanet_keras.evaluation import report
from retinanet_keras.evaluation.coco_metrics import METRICS, coco_metrics, format_metrics
from retinanet_keras.evaluation.report import caption, write_report
from retinanet_keras.visualization import plots, text_table

NAMES = ("<b>", '"', "a & 'b'", "Straße 木", "</style><script>alert(1)</script>", "never \ud800 seen")
BLUE = (20, 40, 220)
SPEED = {"input": 3.25, "network": 151.0, "post_processing": 4.5, "images_per_second": 6.3}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def metrics():
    """Of 12 images with an object each of all classes but the last; class k is found in k of 4."""
    rows = [(i, k, 10 + 100 * k, 10, 40 + 10 * i, 60) for i in range(12) for k in range(len(NAMES) - 1)]
    found = [(*row, 0.3 + 0.05 * row[0]) for row in rows if row[0] % 4 < row[1]] + [(0, 5, 0, 0, 9, 9, 0.9)]
    annotations = {
        "images": [{"id": i} for i in range(12)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(NAMES)],
        "annotations": [{"image_id": r[0], "category_id": r[1], "bbox": list(r[2:])} for r in rows],
    }
    results = [{"image_id": r[0], "category_id": r[1], "bbox": list(r[2:6]), "score": r[6]} for r in found]
    return coco_metrics(annotations, results)


@pytest.fixture(scope="module")
def page(metrics, tmp_path_factory):
    """A report with everything in it."""
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    wide = np.tile(np.uint8(BLUE), (600, 1500, 1))
    ends = {end: [(caption(row), wide) for row in metrics["images"][end]] for end in ("best", "worst")}
    ends["worst"][0] = ('"><img src=http://example.com/x>', wide)
    about = {"model": "runs/<i>x</i>", "split": "val & test"}
    write_report(path, metrics, title="A <title> & more", about=about, speed=SPEED, **ends)
    return path


class Reader(html.parser.HTMLParser):
    """Elements as (tag, attributes), and the text; tags that do not close one another are an error."""

    VOID = {"meta", "img", "rect", "line", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def test_the_page_says_what_was_found(page, metrics):
    text = Reader(page.read_text(encoding="utf-8")).text
    for said in ("A <title> & more", "runs/<i>x</i>", "val & test", "12 images, 60 objects of 6 classes", "151.00"):
        assert said in text
    for name in METRICS:
        assert name in text and f"{100 * metrics[name]:.1f}" in text if metrics[name] is not None else "–" in text
    assert caption(metrics["images"]["best"][0]) in text and "158.75" in text  # the sum of the stages


def test_classes_are_sorted_and_no_name_becomes_markup(page):
    reader = Reader(page.read_text(encoding="utf-8"))
    assert {tag for tag, _ in reader.elements}.isdisjoint({"b>", "script", "i", "link", "iframe", "object", "base"})
    table = reader.text[reader.text.index("The best first") :]
    shown = [name.replace("\ud800", "\\ud800") for name in NAMES]
    assert sorted(shown, key=table.index) == [*shown[4:0:-1], shown[0], shown[5]]  # class k: k of 4; None is last


def test_names_are_short_text_in_the_page_and_in_tables(tmp_path, metrics):
    row = next(iter(metrics["per_class"].values()))
    changed = {**metrics, "per_class": {"\x1b[2J" + "x" * 100_000: row, "cat": row}, "curves": {"all": None}}
    write_report(tmp_path / "page.html", changed, title="\x1b]0;title\x07")
    for text in ((tmp_path / "page.html").read_text(encoding="utf-8"), format_metrics(changed)):
        assert r"\x1b[2Jx" in text and "\x1b" not in text and "\x07" not in text and "x" * 400 not in text
    (line,) = text_table.rows("folder/\udcff\x1b[31m.jpg", [[1, 2, 3, 4]], [0.5], ["\x1b" * 100_000], 0.3)
    assert line.startswith(r"folder/\xff\x1b[31m.jpg  ") and line.isprintable() and len(line) == len(text_table.HEADER)
    (line,) = text_table.rows("\x1b" * 200, [], [], [], 0.3)
    assert line.isprintable() and len(line) < 80


def test_the_file_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    elements = Reader(text).elements
    for tag, attributes in elements:
        assert not set(attributes) & {"href", "srcset", "action", "background"}, tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,"), tag
    assert not re.search(r"url\(|@import|<script|<link", text)
    (policy,) = (a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_pictures_are_inside_and_shrunk(page, metrics):
    sources = [a["src"] for tag, a in Reader(page.read_text(encoding="utf-8")).elements if tag == "img"]
    assert len(sources) == sum(len(metrics["images"][end]) for end in ("best", "worst")) > 2
    for source in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert picture.size == (report.PICTURE_SIDE, report.PICTURE_SIDE * 600 // 1500)
        assert np.abs(np.asarray(picture, int)[100, 100] - BLUE).max() < 8


@pytest.mark.parametrize("objects", [0, 1])
def test_empty_results_make_a_page(tmp_path, objects):
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}
    tree = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "x"}], "annotations": [box] * objects}
    write_report(tmp_path / "report.html", coco_metrics(tree, []))
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "0 detections" in reader.text and ("no curves" in reader.text) == (not objects)
    for absent in ("Speed", "Worst images", "Best images"):
        assert absent not in reader.text


def test_a_speed_that_was_not_measured_is_absent(tmp_path, metrics):
    write_report(tmp_path / "report.html", metrics, speed={"network": 20.0})
    text = Reader((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "forward pass" in text and "suppression" not in text and "per second" not in text


def test_no_classes_make_a_page(tmp_path):
    write_report(tmp_path / "report.html", coco_metrics({"images": [], "categories": [], "annotations": []}, []))
    assert "0 images" in (tmp_path / "report.html").read_text(encoding="utf-8")


def points(svg, series):
    found = re.search(rf'<polyline class="s{series}" points="([^"]*)"', svg)[1]
    return [tuple(map(float, pair.split(","))) for pair in found.split()]


def test_curves_are_where_their_values_are():
    svg = plots.lines([[1, 1, 0.5], [0, 0.25, 1]], "x", size=(400 + 44 + 10, 200 + 8 + 36))
    assert points(svg, 0) == [(44, 8), (244, 8), (444, 108)]
    assert points(svg, 1) == [(44, 208), (244, 158), (444, 8)]


def test_a_bar_is_a_step_higher_for_each_tenfold():
    svg = plots.bars([0, 0.5, 1], [[1, 1000], [0, 10]], "x", "a", "b", size=(300, 400 + 8 + 36))
    bars = re.findall(r'<rect class="s(\d)".*?height="([\d.]+)"', svg)
    assert bars == [("0", "100.0"), ("0", "400.0"), ("1", "200.0")]  # a step is 100; nothing is no bar


def chromium(page, folder, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               f"--user-data-dir={folder}", *options, page.as_uri()]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, timeout=600, cwd=folder).stdout.decode("utf-8")


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
def test_a_browser_reads_it_as_meant(page, tmp_path):
    dom = Reader(re.sub("</(line|rect|polyline)>", "", chromium(page, tmp_path, "--dump-dom")))
    written = Reader(page.read_text(encoding="utf-8"))
    # A browser repairs what it does not accept (rows outside of tables, tags that do not match): nothing was to repair.
    assert [tag for tag, _ in dom.elements] == [tag for tag, _ in written.elements]
    assert "".join(dom.text.split()) == "".join(written.text.split())
    assert sum(tag == "polyline" for tag, _ in dom.elements) == 3 * len(NAMES)  # the mean, and the 5 with objects


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
def test_a_browser_paints_it(page, tmp_path):
    shot = tmp_path / "shot.png"
    chromium(page, tmp_path, f"--screenshot={shot}", "--window-size=1100,4200", "--hide-scrollbars")
    pixels = np.asarray(Image.open(shot).convert("RGB"), int)
    assert (np.abs(pixels - BLUE).max(axis=2) < 12).sum() > 50_000  # the pictures
    assert (pixels == (0, 114, 178)).all(axis=2).sum() > 300  # the first curve and bars
    assert (pixels == (207, 227, 241)).all(axis=2).sum() > 2000  # the levels in the tables


def test_the_metrics_are_json(metrics):
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
