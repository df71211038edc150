"""The paper's figures: their numbers against float64 NumPy and by hand, their pictures by what is in them."""

import csv
import json
import shutil
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from PIL import Image

from retinanet_keras import objective, targets
from retinanet_keras.anchors import STRIDES, anchor_boxes, grid
from retinanet_keras.cli import parser as command_line
from retinanet_keras.config import config_from_dict, load_config
from retinanet_keras.data import canvas, dataset_formats, image_decoding
from retinanet_keras.data.shapes import NAMES
from retinanet_keras.errors import UserError
from retinanet_keras.experiments import paper, timing
from retinanet_keras.experiments.figures import architecture, distribution, loss_curves, speed, star
from retinanet_keras.losses import FocalLoss, SmoothL1Loss
from retinanet_keras.training.build import build_model
from retinanet_keras.training.resume import Checkpoints
from retinanet_keras.training.run_folder import RunFolder
from retinanet_keras.visualization.draw import PALETTE

pytestmark = pytest.mark.eager

ROOT = Path(__file__).parents[1]
BLUE, RED = PALETTE[0], PALETTE[5]


def table(folder, number):
    """{column: values} of a figure's CSV, after a look at its picture."""
    picture = np.asarray(Image.open(folder / f"figure{number}.png").convert("RGB"))
    assert min(picture.shape[:2]) > 400 and (picture < 128).any() and (picture == 255).all(-1).mean() > 0.3
    with open(folder / f"figure{number}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {column: [row[column] for row in rows] for column in rows[0]}


def shows(path, color):
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (np.abs(picture - color).max(-1) < 8).sum() > 200


def run_command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["retinanet_keras", *map(str, words)])
    return command_line.main()


@pytest.fixture(scope="module")
def run(tiny_config, data_dir, tmp_path_factory):
    """A run's folder with a checkpoint of random weights and an AP."""
    config = tiny_config(data_dir)
    folder = RunFolder(tmp_path_factory.mktemp("figures") / "tiny")
    categories = dataset_formats.open_split(config.data, "train").categories
    folder.start(config, categories)
    keras.utils.set_random_seed(0)
    checkpoints = Checkpoints(build_model(config, categories), folder, 1)
    checkpoints.step = 1
    checkpoints.save()
    folder.evaluation("val").mkdir(parents=True)
    (folder.evaluation("val") / "metrics.json").write_text('{"AP": 0.25}')
    return folder.path


# Figures 1, 5 and 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def minus_log(x):
    """-log(p_t)."""
    return np.log1p(np.exp(-x))


CLOSED = [  # Appendix B for y = 1: loss, value, derivative; 1 - p_t is sigmoid(-x_t)
    (loss_curves.focal_of(0.0), minus_log, lambda x: -sigmoid(-x)),
    (loss_curves.focal_of(2.0), lambda x: sigmoid(-x) ** 2 * minus_log(x),
     lambda x: sigmoid(-x) ** 2 * (-2 * sigmoid(x) * minus_log(x) - sigmoid(-x))),
    (loss_curves.star_of(2.0, 1.0), lambda x: minus_log(2 * x + 1) / 2, lambda x: -sigmoid(-(2 * x + 1))),
    (loss_curves.star_of(4.0, 0.0), lambda x: minus_log(4 * x) / 4, lambda x: -sigmoid(-4 * x)),
]  # fmt: skip


@pytest.mark.parametrize("loss, value, slope", CLOSED)
def test_curves_and_their_derivatives(loss, value, slope):
    x, step = np.linspace(-5, 5, 201), 1e-6
    own_value, own_slope = loss_curves.value_and_slope(loss, x)
    assert own_value.dtype == own_slope.dtype == np.float64
    np.testing.assert_allclose(own_value, value(x), rtol=1e-10)
    np.testing.assert_allclose(own_slope, slope(x), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(own_slope, (value(x + step) - value(x - step)) / (2 * step), atol=1e-8)


def test_figure1_has_the_numbers_of_section_3(tmp_path, monkeypatch):
    """With gamma = 2: at p_t = .9 a hundredth of CE, at .968 a thousandth, under .5 a quarter or more."""
    run_command(monkeypatch, "figure", 1, "--to", tmp_path)
    columns = {name: np.float64(values) for name, values in table(tmp_path, 1).items()}
    assert list(columns) == ["p_t", *(f"FL gamma={gamma}" for gamma in ("0", "0.5", "1", "2", "5"))]
    ratio = columns["FL gamma=0"] / columns["FL gamma=2"]
    at = {p: int(np.argmin(np.abs(columns["p_t"] - p))) for p in (0.5, 0.9, 0.968)}
    assert ratio[at[0.9]] == pytest.approx(100) and ratio[at[0.968]] == pytest.approx(1000, rel=0.03)
    assert (ratio[: at[0.5] + 1] <= 4 + 1e-6).all()
    assert columns["FL gamma=0"][at[0.5]] == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    "number, at_zero",
    [
        (5, [0.6931472, 0.1732868, 0.1566308, 0.1732868]),  # ln 2, a quarter of it, ln(1 + 1/e) / 2, ln(2) / 4
        (6, [-0.5, -0.2982868, -0.2689414, -0.5]),  # FL: .25 (2 * .5 * ln .5 - .5)
    ],
)
def test_figures_5_and_6(number, at_zero, tmp_path, monkeypatch):
    run_command(monkeypatch, "figure", number, "--to", tmp_path)
    columns = table(tmp_path, number)
    middle = columns["x_t"].index("0")
    assert list(columns)[1:] == ["CE", "FL gamma=2", "FL* gamma=2 beta=1", "FL* gamma=4 beta=0"]
    assert [float(values[middle]) for values in list(columns.values())[1:]] == pytest.approx(at_zero, abs=1e-6)


# Figure 2


def test_the_papers_points():
    points = speed.of_the_paper()
    by_name = {(p["method"], p["scale"]): (p["milliseconds"], p["AP"]) for p in points}
    assert len(by_name) == len(points) == 14
    assert by_name["RetinaNet-101", "600"] == (122, 36.0) and by_name["Faster R-CNN w FPN", ""] == (172, 36.2)
    for method in ("RetinaNet-50", "RetinaNet-101"):
        own = [by_name[method, str(scale)] for scale in (400, 500, 600, 700, 800)]
        assert own == sorted(own) and all(a < b for (_, a), (_, b) in zip(own, own[1:], strict=False))
    # §5.2: "there is only one operating point (500 pixel input) at which using ResNet-50-FPN improves over ..."
    better = {
        a[1] for a in by_name for b in by_name
        if a[0] == "RetinaNet-50" and b[0] == "RetinaNet-101"
        and by_name[a][0] <= by_name[b][0] and by_name[a][1] >= by_name[b][1]
    }  # fmt: skip
    assert better == {"500"}
    for _, scale in by_name:
        assert not scale or load_config(ROOT / f"configs/r50_{scale}.json").data.short_side == int(scale)


def test_figure2_has_points_of_runs_beside_the_papers(run, tmp_path, monkeypatch):
    run_command(monkeypatch, "figure", 2, "--to", tmp_path)
    assert set(table(tmp_path, 2)["whose"]) == {"the paper"}
    run_command(monkeypatch, "figure", 2, "--runs", run, "--to", tmp_path)
    columns = table(tmp_path, 2)
    (place,) = (i for i, whose in enumerate(columns["whose"]) if whose == "measured here")
    assert columns["method"][place] == "tiny" and columns["AP"][place] == "25"
    assert columns["source"][place] == f"{run}, val" and float(columns["milliseconds"][place]) > 0


def test_runs_are_found_one_or_many(run, tmp_path):
    for name, metrics in (("a", '{"AP": 0.5}'), ("b", '{"AP": null}'), ("c", '{"AP": 0.125}')):
        (tmp_path / name / "eval/test").mkdir(parents=True)
        (tmp_path / name / "eval/test/metrics.json").write_text(metrics)
    points = speed.of_runs(tmp_path, lambda runs: {folder: len(folder.name) for folder in runs})
    assert [(p["method"], p["AP"], p["milliseconds"]) for p in points] == [("a", 50, 1), ("c", 12.5, 1)]
    assert [p["AP"] for p in speed.of_runs(run, lambda runs: dict.fromkeys(runs, 1.0))] == [25]


def test_figure2_of_no_runs_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "1e").mkdir()
    (tmp_path / "1e/time.json").write_text('{"about": "", "rows": {"r50_400": 1.0}}')  # times alone have no AP
    for folder in (tmp_path, tmp_path / "1e", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no evaluated run and no finished row.*Give --runs.*experiments 1e --to"):
            run_command(monkeypatch, "figure", 2, "--runs", folder, "--to", tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.fixture
def experiments(run, tmp_path):
    """A folder as `experiments 1e` leaves it: two rows with an AP, one that diverged, one that is unfinished."""
    place = tmp_path / "experiments/1e"
    for row, seed, result in (
        ("r50_400", 0, {"AP": 0.25}), ("r50_400", 1, {"AP": 0.5}), ("r50_400", 2, {"diverged": 3}),
        ("r50_500", 1, {"AP": 0.75}), ("r50_600", 0, {"diverged": 7}), ("r50_700", 0, None),
    ):  # fmt: skip
        folder = place / row / str(seed)
        shutil.copytree(run, folder)
        (folder / "log.csv").write_text("step,loss\n2,1.5\n")
        if result:
            (folder / "result.json").write_text(json.dumps({**dict.fromkeys(paper.METRICS), **result}))
    for folder in (place / "r50_400/0", place / "r50_500/1"):  # of the paper's network, which time.json is about
        config = json.loads((folder / "config.json").read_text())
        config["model"] |= {"backbone": "resnet50", "width": 64, "fpn_channels": 256, "head_depth": 4}
        config["data"] |= {"short_side": int(folder.parent.name[4:]), "max_side": 1000}
        (folder / "config.json").write_text(json.dumps(config))
    return place


def test_figure2_reads_what_experiments_write(experiments, tmp_path, monkeypatch):
    """By hand: the mean of 25 and 50; time from time.json where it has the row and the run its network."""
    monkeypatch.setattr(speed, "detection_times", lambda runs: dict.fromkeys(runs, 7.0))
    (experiments / "time.json").write_text('{"about": "by hand", "rows": {"r50_400": 123.5, "r101_800": 9}}')
    for folder in (experiments.parent, experiments):
        run_command(monkeypatch, "figure", 2, "--runs", folder, "--to", tmp_path)
        columns = table(tmp_path, 2)
        own = [i for i, whose in enumerate(columns["whose"]) if whose == "measured here"]
        assert [columns["method"][i] for i in own] == ["r50_400", "r50_500"]
        assert [columns["AP"][i] for i in own] == ["37.5", "75"]
        timed, untimed = own
        assert columns["milliseconds"][timed] == "123.5" and columns["milliseconds"][untimed] == "7"
        of_times = f"time: {experiments}/time.json"
        assert columns["source"][timed] == f"{experiments}/r50_400, val, mean of seeds 0 1; {of_times}"
        assert columns["source"][untimed] == f"{experiments}/r50_500, val, mean of seeds 1"


def test_only_what_has_no_time_is_timed(experiments):
    asked = []
    (experiments / "time.json").write_text('{"about": "by hand", "rows": {"r50_500": 2.0}}')
    points = speed.of_runs(experiments, lambda runs: asked.extend(runs) or dict.fromkeys(runs, 1.0))
    assert asked == [experiments / "r50_400/0"] and [point["milliseconds"] for point in points] == [1.0, 2.0]


def test_times_of_the_papers_models_are_not_taken_for_small_ones(experiments, run):
    shutil.copy(run / "config.json", experiments / "r50_400/0/config.json")
    (experiments / "time.json").write_text('{"about": "by hand", "rows": {"r50_400": 2.0, "r50_500": 3.0}}')
    points = speed.of_runs(experiments, lambda runs: dict.fromkeys(runs, 1.0))
    assert [(point["milliseconds"], point["timed"]) for point in points] == [
        (1.0, speed.FROM_RUN), (3.0, speed.FROM_TABLE),
    ]  # fmt: skip


def test_models_are_timed_as_table_1e_is(run, tiny_config, data_dir, monkeypatch):
    """One image of 4:3 within 64 pixels, without a score threshold, which the run's own configuration has."""
    config = tiny_config(data_dir, detection={"score_threshold": 0.05, "p7_threshold": 0.5})
    monkeypatch.setattr(speed, "load_config_of", lambda folder: config)
    seen = []

    def compiled(model):
        def detect(images, sizes):
            seen.append((model.detection.score_threshold, model.detection.p7_threshold, images.shape, sizes.numpy()))
            return {"scores": sizes}

        return detect

    monkeypatch.setattr(speed.folding, "compiled", compiled)
    times = speed.detection_times([run])
    assert list(times) == [run] and times[run] > 0 and len(seen) == timing.ROUNDS + 1
    for threshold, of_p7, shape, sizes in seen:
        assert threshold == timing.SCORE_THRESHOLD == 0 and of_p7 is None
        assert shape == (1, 48, 64, 3) and sizes.tolist() == [[48, 64]]


# Figure 3


@pytest.mark.parametrize("depth, size", [(0, (64, 96)), (2, (128, 64))])
def test_the_operations_of_a_model(small_model, depth, size):
    model = small_model(head_depth=depth)
    pixels = np.random.default_rng(0).integers(0, 256, (1, *size, 3)).astype("uint8")
    before = model(pixels)
    rows = architecture.operations(model, *size)
    by_name = {row["node"]: row for row in rows}
    outputs = {row["output"]: row for row in rows if row["output"]}
    assert len(by_name) == len(rows) and sum(row["parameters"] for row in rows) == model.count_params()
    for i, row in enumerate(rows):  # what a row takes comes before it
        assert set(row["inputs"]) <= {"images", *(earlier["node"] for earlier in rows[:i])}

    assert {*outputs} == {"c3", "c4", "c5", "p3", "p4", "p5", "p6", "p7", "logits", "deltas"}
    for level, stride in enumerate(STRIDES, 3):
        assert (outputs[f"p{level}"]["height"], outputs[f"p{level}"]["width"]) == grid(*size, stride)
    for name in ("logits", "deltas"):
        assert (outputs[name]["width"], outputs[name]["channels"]) == tuple(before[name].shape[1:])
    for part in ("class_subnet", "box_subnet"):
        convs = [row for row in rows if row["part"] == part and row["kind"] == "Conv2D"]
        assert len(convs) == 5 * (depth + 1)  # the same ones on five levels

    def above(row, *kinds):
        """What a row comes from, through operations of these kinds."""
        while (row := by_name[row["inputs"][0]])["kind"] in kinds:
            pass
        return row["output"]

    assert above(outputs["p6"], "ZeroPadding2D") == "c5"  # §4: P6 from C5, P7 from ReLU(P6)
    assert above(outputs["p7"], "ZeroPadding2D", "Relu") == "p6"
    assert by_name[by_name[outputs["p7"]["inputs"][0]]["inputs"][0]]["kind"] == "Relu"
    sums = [row for row in rows if row["part"] == "pyramid" and row["kind"] == "Add"]
    assert sorted(row["height"] for row in sums) == [size[0] // 16, size[0] // 8]
    for name, value in model(pixels).items():  # tracing has changed nothing
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("stride_in", ["1x1", pytest.param("3x3", marks=pytest.mark.slow)])
def test_the_stages_of_a_resnet50(small_model, stride_in):
    """A stem, 3, 4, 6 and 3 blocks of three convolutions, a shortcut in each stage, wherever the stride is."""
    model = small_model(1, "resnet50", stride_in=stride_in)
    rows = [row for row in architecture.operations(model, 64, 64) if row["part"] == "backbone"]
    stages = architecture.stages(rows)
    convs = [sum(row["kind"] == "Conv2D" for row in stage) for stage in stages]
    assert [stage[-1]["output"] for stage in stages] == [None, None, None, "c3", "c4", "c5"]
    assert [(stage[-1]["height"], stage[-1]["channels"]) for stage in stages[1:]] == [
        (32, 8), (16, 32), (8, 64), (4, 128), (2, 256)
    ]  # fmt: skip
    assert convs == [0, 1, 10, 13, 19, 10]


def test_figure3_follows_the_configuration(tiny_config, data_dir, tmp_path, monkeypatch):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(tiny_config(data_dir, model={"head_depth": 3}).to_dict()))
    run_command(
        monkeypatch, "figure", 3, "--config", file, "--set", "model.fpn_channels=24", "--classes", 7, "--to", tmp_path
    )
    columns = table(tmp_path, 3)
    finals = [columns["channels"][i] for i, node in enumerate(columns["node"]) if node.endswith("subnet.final")]
    towers = [node for node in columns["node"] if node.startswith("class_subnet.conv") and "#" not in node]
    assert finals == ["63", "36"] and len(towers) == 3 and "24" in columns["channels"]


# Figure 4


def sorted_shares(x_t, gamma, fractions):
    """The cumulative distribution by a full sort in float64."""
    x = np.float64(x_t)
    loss = np.sort((1 - sigmoid(x)) ** gamma * np.log1p(np.exp(-x)))
    cumulative = np.concatenate([[0], np.cumsum(loss)]) / loss.sum()
    return np.interp(fractions, np.arange(len(loss) + 1) / len(loss), cumulative)


@pytest.mark.parametrize("mean", [-2, 6])
def test_shares_are_those_of_a_full_sort(mean):
    x_t = np.random.default_rng(mean + 2).normal(mean, 3, 50_000).astype("float32")
    terms = distribution.Terms()
    for part in np.split(x_t, [7, 20_000, 20_000]):  # one is empty
        terms.add(part)
    fractions = np.concatenate([np.linspace(0, 1, 101), [0.999, 0.9999]])
    for gamma in distribution.GAMMAS:
        ours = terms.shares(gamma, fractions)
        assert ours[0] == 0 and ours[100] == pytest.approx(1) and (np.diff(ours[:101]) >= 0).all()
        np.testing.assert_allclose(ours, sorted_shares(x_t, gamma, fractions), atol=3e-4)
        assert terms.hardest(gamma, 0.01) == pytest.approx(1 - sorted_shares(x_t, gamma, 0.99), abs=3e-4)


def test_shares_by_hand():
    """Three terms of ln 2 and one of nearly 0, in order of size; and x_t beyond all bins still count."""
    terms = distribution.Terms()
    terms.add(np.float32([0, 30, 0, 0]))
    assert terms.shares(0.0, [0.25, 0.5, 1]) == pytest.approx([0, 1 / 3, 1], abs=1e-6)
    assert terms.hardest(0.0, 0.25) == pytest.approx(1 / 3)
    terms = distribution.Terms()
    terms.add(np.float32([-100, -300, 500]))
    assert terms.hardest(2.0, 2 / 3) == pytest.approx(1) and terms.sums[3].sum() == pytest.approx(400)


def test_terms_by_hand():
    """K = 3. Positive anchors of class 1 and 0, one of background, one ignored: 2 positives, 2 + 2 + 3 negatives."""
    logits = tf.constant([[[1.0, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]])  # [B, A, K]
    classes = tf.constant([[1, targets.BACKGROUND], [targets.IGNORE, 0]])
    positive, negative = distribution.x_t_of(logits, classes)
    assert positive.numpy().tolist() == [2, 10]
    assert sorted(-negative.numpy()) == [1, 3, 4, 5, 6, 11, 12]


def test_terms_are_those_of_the_loss(run, tiny_config, data_dir):
    """As many as its targets, and with the sum that training divides by the normalizer, for each gamma."""
    config, model = tiny_config(data_dir), distribution.load_run(run)[1]
    dataset = dataset_formats.open_split(config.data, "train")
    positive, negative, seen = distribution.collect(model, dataset, config)
    counts, settings = {"positive": 0, "negative": 0}, [*((gamma, None) for gamma in distribution.GAMMAS), (2.0, 0.25)]
    totals = np.zeros(len(settings))
    for i in range(len(dataset)):
        pixels, size, scale = canvas.fit(image_decoding.image_of(dataset, i)[None], 64, 64)
        outputs = model._outputs_in_graph(pixels, size[None])
        anchors = anchor_boxes(*pixels.shape[1:3], config.anchors)
        gt_boxes, gt_labels = dataset.boxes_of(i) * scale, dataset.labels_of(i)
        for row, (gamma, alpha) in enumerate(settings):
            totals[row] += objective.loss_terms(
                outputs, gt_boxes[None], gt_labels[None], anchors, target_config=config.targets,
                classification_loss=FocalLoss(alpha, gamma), box_loss=SmoothL1Loss(), normalizer="minibatch",
            ).classification  # fmt: skip
        classes, _ = reference.assign(np.asarray(anchors), gt_boxes, gt_labels, "detectron")
        of_image = int((classes >= 0).sum())
        counts["positive"] += of_image
        counts["negative"] += int((classes != targets.IGNORE).sum()) * len(NAMES) - of_image
    assert seen == len(dataset) == 10
    assert (positive.counts.sum(), negative.counts.sum()) == (counts["positive"], counts["negative"])
    assert counts["positive"] > 20
    of_positives, of_negatives = positive.sums.sum(1), negative.sums.sum(1)
    np.testing.assert_allclose(of_positives + of_negatives, totals[:-1], rtol=1e-5)
    assert 0.25 * of_positives[-1] + 0.75 * of_negatives[-1] == pytest.approx(totals[-1], rel=1e-5)


@pytest.mark.slow
def test_it_stops_at_the_papers_numbers_of_windows(run, tiny_config, data_dir, monkeypatch):
    config, model = tiny_config(data_dir), distribution.load_run(run)[1]
    dataset = dataset_formats.open_split(config.data, "train")
    monkeypatch.setattr(distribution, "CHUNK", 2)
    monkeypatch.setattr(distribution, "POSITIVES", 1)
    monkeypatch.setattr(distribution, "NEGATIVES", 1000)
    assert distribution.collect(model, dataset, config)[2] < 10
    assert distribution.collect(model, dataset, config, images=5)[2] == 5


def test_figure4_tells_its_findings_beside_the_papers_words(run, tmp_path, monkeypatch, capsys):
    run_command(monkeypatch, "figure", 4, "--run", run, "--split", "train", "--to", tmp_path)
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "figure4.json").read_text())
    columns = {name: np.float64(values) for name, values in table(tmp_path, 4).items()}
    assert found["split"] == "train" and found["images"] == 10 and found["negatives"] > found["positives"] > 0
    for kind, name, easy in (
        ("positive", "positive loss in the hardest 20%", 0.8), ("negative", "negative loss in the hardest 1%", 0.99)
    ):  # fmt: skip
        row = int(np.argmin(np.abs(columns["easiest fraction"] - easy)))
        for gamma, share in found[name].items():
            assert share == pytest.approx(1 - columns[f"{kind} gamma={gamma}"][row], abs=1e-3)
        assert f"γ = 2: {100 * found[name]['2']:.1f}%" in said
    assert "roughly half of the positive loss" in said and "the vast majority of the loss" in said


def test_figure4_of_no_run_or_no_objects_says_so(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="There is no run"):
        run_command(monkeypatch, "figure", 4, "--run", tmp_path)
    data = Path(json.loads((run / "config.json").read_text())["data"]["dir"])
    shutil.copytree(data, tmp_path / "data")
    file = tmp_path / "data/annotations/instances_val.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    with pytest.raises(UserError, match="no positive anchors"):
        run_command(
            monkeypatch, "figure", 4, "--run", run, "--split", "val", "--to", tmp_path, "--set",
            f"data.dir={tmp_path / 'data'}", "data.source=coco",
        )  # fmt: skip


# Figure 7


def finish(folder, name, ap):
    (folder / name / "eval/test").mkdir(parents=True)
    (folder / name / "eval/test/metrics.json").write_text(json.dumps({"AP": ap}))


def test_every_declared_run_is_a_configuration_of_its_own():
    seen = set()
    for name, setting in star.settings().items():
        loss = load_config(ROOT / "configs/shapes.json", star.overrides(name)).loss
        assert loss.alpha == 0.25
        if setting is None:
            assert (loss.kind, loss.gamma) == ("focal", 2.0)
        else:
            assert (loss.kind, loss.gamma, loss.star_beta) == ("focal_star", *setting)
        seen.add((loss.kind, loss.gamma, loss.star_beta))
    assert len(seen) == len(star.settings()) == 16
    assert {(2.0, 1.0), (4.0, 0.0)} <= set(star.settings().values())  # those of Table 3


def test_figure7_plots_what_is_done_and_lists_what_is_missing(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    words = ["figure", 7, "--runs", runs, "--config", ROOT / "configs/shapes.json", "--to", tmp_path]
    run_command(monkeypatch, *words, "--set", "train.iterations=50")
    said = capsys.readouterr().out
    assert said.count("python train.py") == 16 and set(table(tmp_path, 7)["state"]) == {"not run"}
    assert f"--workdir {runs}/g2_b1 --set loss.kind=focal_star" in said and said.count("train.iterations=50") == 16
    assert not shows(tmp_path / "figure7.png", BLUE)

    finish(runs, "g2_b1", 0.34)
    assert star.states(runs)["g2_b1"] == ("not compared", 0.34)
    finish(runs, "focal", 0.34)
    finish(runs, "g2_b0", 0.335)  # the paper's own limit
    finish(runs, "g1_b0", 0.3349)
    finish(runs, "g1_b-2", None)  # nothing to be found
    (runs / "g4_b-2/failed").mkdir(parents=True)
    (runs / "g4_b-2/failed/step-7.npz").touch()
    (runs / "g4_b2").mkdir()  # begun, not at its end
    capsys.readouterr()
    run_command(monkeypatch, *words)
    said = capsys.readouterr().out
    columns = table(tmp_path, 7)
    states = dict(zip(columns["run"], columns["state"], strict=True))
    assert {name: state for name, state in states.items() if state != "not run"} == {
        "focal": "effective", "g2_b1": "effective", "g2_b0": "effective", "g1_b0": "not effective",
        "g1_b-2": "not effective", "g4_b-2": "diverged",
    }  # fmt: skip
    assert said.count("python train.py") == 10 and "g4_b2 " in said and "g2_b1 " not in said
    assert shows(tmp_path / "figure7.png", BLUE) and shows(tmp_path / "figure7.png", RED)
    with pytest.raises(UserError, match="several splits"):
        (runs / "focal/eval/val").mkdir()
        shutil.copy(runs / "focal/eval/test/metrics.json", runs / "focal/eval/val")
        star.states(runs)
    with pytest.raises(UserError, match="loss.gama"):
        run_command(monkeypatch, *words, "--set", "loss.gama=1")


def test_figure3_is_of_the_whole_pyramid(tmp_path):
    with pytest.raises(UserError, match='anchors.levels: expected "pyramid".*got "last"'):
        architecture.figure3(tmp_path, config_from_dict({"anchors": {"levels": "last"}}))
