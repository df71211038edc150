"""Pictures: the pixels that carry meaning."""

import time

import numpy as np
import pytest
from PIL import Image

from retinanet_keras.visualization import draw

NAMES = ("cat", "dog", "a class with a very long name indeed")
GRAY = 128


def blank(height=240, width=320):
    return np.full((height, width, 3), GRAY, np.uint8)


def changed(picture):
    """bool [H, W]: where a gray image was drawn on."""
    return (picture != GRAY).any(axis=-1)


def test_box_lies_on_its_own_pixels():
    picture = draw.draw_boxes(blank(), [[40, 50, 140, 150]], None, (), width=1)
    rows, columns = np.nonzero(changed(picture))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (50, 149, 40, 139)
    assert changed(picture).sum() == 4 * 100 - 4
    assert (picture[50, 40:140] == draw.NO_CLASS).all()


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_edges_have_the_color_of_the_class(width):
    picture = draw.draw_boxes(blank(), [[40, 50, 140, 150], [200, 50, 300, 150]], [0, 1], NAMES, width=width)
    for left, label in ((40, 0), (200, 1)):
        for y, x in ((100, left), (100, left + 99), (149, left + 50)):
            assert tuple(picture[y, x]) == draw.color(label)
    assert (picture[70:140, 50:130] == GRAY).all()


def test_lines_grow_with_the_image():
    small, large = (changed(draw.draw_boxes(blank(s, s), [[0.2 * s, 0.2 * s, 0.8 * s, 0.8 * s]], None, ()))
                    for s in (100, 2000))  # fmt: skip
    assert small[50].sum() == 2 and large[1000].sum() > 8


def test_colors_are_distinct_and_fixed():
    colors = [draw.color(label) for label in range(90)]
    assert len(set(colors)) == 90
    assert colors == [draw.color(np.int64(label)) for label in range(90)]
    assert all(isinstance(c, int) and 0 <= c <= 255 for color in colors for c in color)
    first = np.array(colors[:7])
    assert np.abs(first[:, None] - first[None]).sum(-1)[~np.eye(7, dtype=bool)].min() > 75


@pytest.fixture
def tags(monkeypatch):
    """The places of the tags drawn, (x1, y1, x2, y2) each."""
    places, place = [], draw._tag_position
    monkeypatch.setattr(draw, "_tag_position", lambda *args: places.append(place(*args)) or places[-1])
    return places


CORNERS = [[0, 0, 30, 30], [290, 0, 320, 30], [290, 210, 320, 240], [300, 5, 340, 9]]


@pytest.mark.parametrize("box", [*CORNERS, [0, 0, 320, 240], [-50, -50, 400, 400]])
def test_tag_is_legible_and_stays_inside(box, tags):
    picture = draw.draw_boxes(blank(), [box], [2], NAMES, [0.87], width=1)
    x1, y1, x2, y2 = tags[0]
    assert 0 <= x1 < x2 <= 320 and 0 <= y1 < y2 <= 240
    assert tuple(picture[y1, x1]) == tuple(picture[y2 - 1, x2 - 1]) == draw.color(2)
    ink = np.abs(picture[y1:y2, x1:x2].astype(int) - draw.color(2)).sum(-1) > 200
    assert 0.03 < ink.mean() < 0.6  # text, in another color


def test_tags_avoid_each_other(tags):
    draw.draw_boxes(blank(), [[50, 100, 150, 200]] * 4, [0, 1, 0, 1], NAMES, [0.9, 0.8, 0.7, 0.6])
    assert len(tags) == 4
    for i, a in enumerate(tags):
        for b in tags[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_a_long_name_is_shortened_before_its_score(tags):
    draw.draw_boxes(blank(100, 90), [[10, 50, 60, 90]], [2], NAMES, [0.87])
    assert 60 < tags[0][2] - tags[0][0] <= 90


@pytest.mark.parametrize(
    "name", ["x" * 100_000, "\x1b" * 100_000, " " * 100_000 + "x", "half \ud800", "a\nb\0c", "\u202e"]
)
def test_any_name_is_drawn_soon(tags, name):
    boxes = np.tile([[10, 50, 60, 90]], (20, 1))
    start = time.perf_counter()
    draw.draw_boxes(blank(), boxes, [0] * 20, (name,), [0.87] * 20)
    assert len(tags) == 20 and time.perf_counter() - start < 5  # it took minutes


def test_controls_in_names_are_drawn_as_text():
    found = [draw.draw_boxes(blank(), [[10, 50, 200, 90]], [0], (name,)) for name in ("a\x1b[31mb", r"a\x1b[31mb")]
    np.testing.assert_array_equal(*found)


def test_a_tiny_image_has_no_tags(tags):
    assert changed(draw.draw_boxes(blank(32, 32), [[5, 5, 20, 20]], [0], NAMES, [0.5])).any() and not tags


def test_text_is_readable_on_every_color():
    for label in range(90):
        back, text = (np.mean(c) for c in (draw.color(label), draw._readable_on(draw.color(label))))
        assert abs(back - text) > 60


def test_best_detection_is_on_top():
    picture = draw.draw_boxes(blank(), [[40, 50, 140, 150]] * 2, [0, 1], NAMES, [0.3, 0.9])
    assert tuple(picture[149, 90]) == draw.color(1)


def test_input_is_left_alone():
    image = blank()
    image.flags.writeable = False
    picture = draw.draw_boxes(image, [[10, 10, 50, 50]], [0], NAMES)
    assert (image == GRAY).all() and picture.flags.writeable and changed(picture).any()


@pytest.mark.parametrize(
    ("boxes", "labels", "scores"),
    [
        (np.zeros((0, 4)), [], []),
        ([], None, None),
        ([[0, 0, 0, 0]], [-1], [0]),  # the padding of model.detect
        ([[330, 10, 350, 20], [-20, 10, -1, 20], [np.nan, 0, 10, 10], [50, 50, 20, 20]], [0, 0, 0, 0], None),
    ],
)
def test_nothing_to_draw(boxes, labels, scores):
    assert (draw.draw_boxes(blank(), boxes, labels, NAMES, scores) == GRAY).all()


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (5, 300), (300, 5), (3000, 4000)])
def test_any_image_size(size):
    height, width = size
    boxes = [[0, 0, width, height], [0.3 * width, 0.3 * height, 0.3 * width, 0.3 * height]]  # the second has no area
    picture = draw.draw_boxes(blank(*size), boxes, [0, 1], NAMES, [0.5, 0.4])
    assert picture.shape == (*size, 3) and tuple(picture[-1, -1]) == draw.color(0)


def test_labels_past_the_names_are_shown_as_numbers():
    assert changed(draw.draw_boxes(blank(), [[10, 50, 60, 100]], [40], NAMES)).any()


def test_bad_input():
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\].*got float32 \[8, 8, 3\]"):
        draw.draw_boxes(np.zeros((8, 8, 3), np.float32), [], None, ())
    with pytest.raises(ValueError, match=r"got uint8 \[8, 8\]"):
        draw.grid([np.zeros((8, 8), np.uint8)])
    with pytest.raises(ValueError, match="2 labels and 1 boxes"):
        draw.draw_boxes(blank(), [[0, 0, 9, 9]], [0, 1], NAMES)
    with pytest.raises(ValueError, match="at least one image"):
        draw.grid([])
    with pytest.raises(ValueError, match="got .*picture.gif"):
        draw.save("picture.gif", blank())


def test_side_by_side_shows_truth_left_and_confident_detections_right():
    boxes = np.array([[100, 100, 200, 200]], np.float32)
    detections = np.array([[100, 100, 200, 200], [20, 120, 80, 180]], np.float32), [0.9, 0.2], [1, 1]
    sheet = draw.side_by_side(blank(), (boxes, [0]), detections, NAMES)
    strip, gap = sheet.shape[0] - 240, sheet.shape[1] - 640
    assert strip > 10 and gap > 0
    left, right = sheet[strip:, :320], sheet[strip:, 320 + gap :]
    assert tuple(left[199, 150]) == draw.color(0) and tuple(right[199, 150]) == draw.color(1)
    assert not changed(right[120:180, 10:90]).any()  # under min_score
    assert (sheet[strip:, 320 : 320 + gap] == 255).all()
    assert (sheet[:strip, :320] < 128).any() and (sheet[:strip, 320 + gap :] < 128).any()  # captions
    everything = draw.side_by_side(blank(), (boxes, [0]), detections, NAMES, min_score=0.1)
    assert changed(everything[strip:, 320 + gap :][120:180, 10:90]).any()


def test_side_by_side_without_truth_is_one_panel():
    sheet = draw.side_by_side(blank(), None, (np.zeros((0, 4)), [], []), NAMES)
    assert sheet.shape[1] == 320 and (sheet[-240:] == GRAY).all()


@pytest.mark.parametrize(
    ("size", "panel"), [((32, 16), (320, 160)), ((3000, 4000), (1200, 1600)), ((1, 640), (1, 640))]
)
def test_side_by_side_scales_boxes_with_the_image(size, panel):
    half = np.array([[0, 0, size[1] / 2, size[0]]])
    sheet = draw.side_by_side(blank(*size), (half, [0]), (half, [0.5], [0]), NAMES)
    left = sheet[-panel[0] :, : panel[1]]
    assert sheet.shape[1] > 2 * panel[1]
    assert tuple(left[-1, panel[1] // 2 - 1]) == draw.color(0) and tuple(left[-1, -1]) == (GRAY,) * 3


def test_grid_dimensions_and_aspect():
    images = [blank(100, 200), blank(200, 100), blank(50, 50)]
    sheet = draw.grid(images, columns=2, cell=(100, 100))
    assert sheet.shape == (2 * 108 + 8, 2 * 108 + 8, 3)
    assert (sheet[0] == 255).all() and (sheet[:, 0] == 255).all()
    for n, (height, width) in enumerate([(50, 100), (100, 50), (100, 100)]):
        row, column = divmod(n, 2)
        cell = sheet[8 + 108 * row :, 8 + 108 * column :][:100, :100]
        rows, columns = np.nonzero((cell != 255).any(-1))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (height, width)
    assert (sheet[116:, 116:] == 255).all()  # the cell left over


def test_grid_chooses_columns():
    assert draw.grid([blank()]).shape == (240 + 16, 320 + 16, 3)
    height, width = draw.grid([blank()] * 16).shape[:2]
    assert 1 < width / height < 2


def test_names_too_long_for_a_file_are_shortened_apart(tmp_path):
    names = ["a" * 251 + ".jpg.png", "a" * 250 + "b.jpg.png", "ß" * 125 + ".jpg.png", "b.png"]
    for i, name in enumerate(names):
        draw.save(tmp_path / name, blank() + np.uint8(i))
    written = sorted(path.name for path in tmp_path.iterdir())
    assert len(written) == 4 and "b.png" in written and all(name.endswith(".png") for name in written)
    assert max(len(name.encode()) for name in written) <= 255


def test_save_by_suffix(tmp_path):
    image = blank()
    image[:100] = 7
    draw.save(tmp_path / "new" / "a.png", image)
    draw.save(tmp_path / "new" / "a.JPG", image)
    assert (np.asarray(Image.open(tmp_path / "new" / "a.png")) == image).all()
    jpeg = Image.open(tmp_path / "new" / "a.JPG")
    assert jpeg.format == "JPEG" and np.abs(np.asarray(jpeg).astype(int) - image).mean() < 2
