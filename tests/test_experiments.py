"""The paper's tables as commands: its numbers, the rows' settings, runs that are killed or diverge, and output."""

import csv
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tensorflow as tf

from retinanet_keras.cli import parser as command
from retinanet_keras.config import config_from_dict, load_config
from retinanet_keras.errors import UserError
from retinanet_keras.experiments import measurements, paper, results_page, runner, tables, timing

ROOT = Path(__file__).parents[1]
TINY = (
    "data.short_side=64 data.max_side=64 data.shapes.side=96 data.shapes.train_images=8 data.shapes.val_images=1 "
    "data.shapes.test_images=2 data.shapes.size=[0.3,0.6] model.width=8 model.fpn_channels=16 model.head_depth=1 "
    "train.iterations=4 train.batch_size=2 train.warmup=1 train.checkpoint_every=2 train.log_every=2 "
    "detection.score_threshold=0 eval.pictures=0"
).split()


def configs(table, scale):
    """{row: (what the paper prints of it, its Config)}."""
    printed = paper.rows(table)
    return {
        row.name: (printed.get(row.name), config_from_dict(tables.tree(table, row, scale, "data")))
        for row in tables.rows(table, scale)
    }


def flat(tree, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    keys = {}
    for name, branch in tree.items():
        keys |= flat(branch, f"{prefix}{name}.") if isinstance(branch, dict) else {prefix + name: branch}
    return keys


# The paper's numbers


def test_the_tables_have_the_papers_rows():
    assert [len(paper.rows(name)) for name in tables.NAMES] == [7, 7, 7, 10, 10, 9, 4, 10]


@pytest.mark.parametrize("table", tables.NAMES)
def test_numbers_are_in_the_order_that_precision_has(table):
    """AP is the mean over IoUs of which .5 is the easiest; smaller objects are harder."""
    for name, row in paper.rows(table).items():
        if row.get("AP50") is not None:
            assert row["AP50"] >= row["AP"] and row["AP50"] >= row["AP75"], name
        if row.get("APs") is not None:
            assert row["APs"] < row["APm"] < row["APl"], name


def test_the_same_model_has_the_same_numbers_in_every_table():
    def numbers(table, row):
        return [paper.rows(table)[row][key] for key in ("AP", "AP50", "AP75")]

    assert numbers("1a", "alpha_.75") == numbers("1b", "gamma_0") == numbers("3", "ce")
    assert numbers("1b", "gamma_2") == numbers("1c", "scales_3_ratios_3") == numbers("3", "fl")
    assert paper.rows("text")["prior"]["AP"] == paper.rows("1a")["alpha_.50"]["AP"]


@pytest.mark.parametrize("table, better, worse, gain", [
    ("1a", "alpha_.75", "alpha_.50", 0.9),  # 5.1: "Setting alpha = .75 gives a gain of 0.9 points AP"
    ("1b", "gamma_2", "gamma_0", 2.9),  # "FL yields a 2.9 AP improvement over the alpha-balanced CE loss"
    ("1d", "fl", "ohem_128_.5", 3.2),  # "This is a gap of 3.2 AP"
    ("2", "retinanet_r101", "dssd513", 5.9),  # 5.3: "a healthy 5.9 point AP gap (39.1 vs. 33.2)"
    ("2", "retinanet_r101", "faster_rcnn_tdm", 2.3),  # "a 2.3 point gap above the top-performing Faster R-CNN"
    ("2", "retinanet_x101", "retinanet_r101", 1.7),  # "further improves results another 1.7 AP"
])  # fmt: skip
def test_gains_that_the_text_tells(table, better, worse, gain):
    rows = paper.rows(table)
    assert rows[better]["AP"] - rows[worse]["AP"] == pytest.approx(gain)


def test_table_1e_rises_with_scale_and_with_depth():
    rows = list(paper.rows("1e").values())
    for depth in (50, 101):
        own = [row for row in rows if row["depth"] == depth]
        assert [row["scale"] for row in own] == [400, 500, 600, 700, 800]
        for key in ("AP", "AP50", "AP75", "APs", "time"):
            assert [row[key] for row in own] == sorted(row[key] for row in own), key
    for shallow, deep in zip(rows[:5], rows[5:], strict=True):
        assert deep["AP"] > shallow["AP"] and deep["time"] > shallow["time"]
    # 5.3: trained longer, "giving a 1.3 AP gain"
    assert paper.rows("2")["retinanet_r101"]["AP"] - rows[-1]["AP"] == pytest.approx(1.3)


# The rows' settings


def defaults_of(config, **changed):
    """Whether a Config at the paper's scale differs from the defaults, the paper's, in these keys and no others."""
    plain = flat(config_from_dict({}).to_dict())
    return {key: value for key, value in flat(config.to_dict()).items() if plain[key] != value} == {
        key.replace("__", "."): value for key, value in changed.items()
    }


@pytest.mark.parametrize("table", tables.NAMES)
def test_every_row_is_trained_as_the_paper_trains(table):
    everywhere, ablations, best = (paper.rows("training")[key] for key in ("all", "1", "2"))
    for name, (_, config) in configs(table, "paper").items():
        train = config.train
        for key in ("batch_size", "learning_rate", "momentum", "weight_decay"):
            assert getattr(train, key) == everywhere[key], (name, key)
        if table == "2":
            assert train.iterations == best["iterations"] and config.data.short_side == best["scale"]
            assert train.drops == tuple(1.5 * drop for drop in everywhere["drops"])
        else:
            assert train.iterations == everywhere["iterations"] and train.drops == tuple(everywhere["drops"])
        if table not in ("1e", "2"):
            assert config.data.short_side == ablations["scale"]
        if not name.startswith(("pi_", "no_prior")):
            assert config.model.prior == everywhere["prior"]


def test_the_results_page_prints_the_papers_numbers():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for depth in (50, 101):
        line = ", ".join(f"{row['AP']}" for row in paper.rows("1e").values() if row["depth"] == depth)
        assert f"{line} (Table 1e, test-dev)" in text
    for table, names in (("2", ["retinanet_r101"]), ("2", ["retinanet_x101"]), ("1a", ["alpha_.50", "alpha_.75"]),
                         ("1d", ["ohem_128_.5", "ohem_1to3_128_.5"])):  # fmt: skip
        line = ", ".join(f"{paper.rows(table)[name]['AP']}" for name in names)
        assert f"| {line} ({paper.about(table)['where']}, {paper.about(table)['data']})" in text
    assert f"`r50_600` ({paper.rows('1b')['gamma_2']['AP']} on" in text
    assert f"`r101_600` ({paper.rows('1d')['fl']['AP']})" in text


SCALE_600 = {"data__short_side": 600, "data__max_side": 1000}


def test_table_1a_is_cross_entropy_with_alpha():
    for row, config in configs("1a", "paper").values():
        changed = {"loss__kind": "cross_entropy"} | ({"loss__alpha": row["alpha"]} if row["alpha"] != 0.25 else {})
        assert defaults_of(config, **SCALE_600, **changed)
        assert config.loss.alpha == row["alpha"]


def test_table_1b_is_the_focal_loss_with_gamma_and_its_alpha():
    for row, config in configs("1b", "paper").values():
        assert (config.loss.kind, config.loss.gamma, config.loss.alpha) == ("focal", row["gamma"], row["alpha"])
        changed = {"loss__gamma": row["gamma"]} if row["gamma"] != 2 else {}
        changed |= {"loss__alpha": row["alpha"]} if row["alpha"] != 0.25 else {}
        assert defaults_of(config, **SCALE_600, **changed)


def test_table_1c_is_scales_and_aspect_ratios():
    for row, config in configs("1c", "paper").values():
        assert config.anchors.scales == row["scales"] and len(config.anchors.ratios) == row["ratios"]
        assert config.anchors.ratios == ((1.0,) if row["ratios"] == 1 else (0.5, 1.0, 2.0))
        assert config.loss == config_from_dict({}).loss and config.data.short_side == 600


def test_table_1d_is_mining_with_resnet_101():
    for name, (row, config) in configs("1d", "paper").items():
        assert config.model.backbone == "resnet101" and config.data.short_side == 600
        mining = config.mining
        if name == "fl":
            assert defaults_of(config, **SCALE_600, model__backbone="resnet101")
        else:
            assert (mining.batch_size, mining.nms_iou) == (row["batch_size"], row["nms_iou"])
            assert mining.ratio == {"OHEM": None, "OHEM 1:3": 3}[row["method"]]
            assert (config.loss.kind, config.loss.alpha) == ("cross_entropy", None)


def test_tables_1e_and_2_are_depth_scale_and_a_longer_training():
    for row, config in configs("1e", "paper").values():
        assert config.model.backbone == f"resnet{row['depth']}" and config.data.short_side == row["scale"]
        assert config.data.max_side == pytest.approx(row["scale"] * 1333 / 800, abs=1)
    for row, config in configs("2", "paper").values():
        assert config.model.backbone == {"ResNet-101-FPN": "resnet101"}.get(row["backbone"], "resnext101_32x8d")
        assert config.data.scale_jitter != (1.0, 1.0)


def test_table_3_is_the_family_of_losses():
    for row, config in configs("3", "paper").values():
        assert config.loss.kind == {"CE": "cross_entropy", "FL": "focal", "FL*": "focal_star"}[row["loss"]]
        assert config.loss.alpha == (0.75 if row["loss"] == "CE" else 0.25)  # Appendix A: "alpha = .25 in all"
        if row["gamma"] is not None:
            assert config.loss.gamma == row["gamma"]
        if row["beta"] is not None:
            assert config.loss.star_beta == row["beta"]


def test_the_running_text():
    of = {name: config for name, (_, config) in configs("text", "paper").items()}
    ce = {**SCALE_600, "loss__kind": "cross_entropy", "loss__alpha": None}
    assert defaults_of(of["no_prior"], **ce, model__prior=0.5) and defaults_of(of["prior"], **ce)
    assert defaults_of(of["pi_.001"], **ce, model__prior=0.001) and defaults_of(of["pi_.1"], **ce, model__prior=0.1)
    assert defaults_of(of["fl"], **SCALE_600) and defaults_of(of["fl_alpha_.5"], **SCALE_600, loss__alpha=0.5)
    assert defaults_of(of["fl_no_alpha"], **SCALE_600, loss__alpha=None)
    assert defaults_of(of["hinge"], **SCALE_600, loss__kind="hinge", loss__alpha=None)
    assert defaults_of(of["last_layer"], **SCALE_600, anchors__levels="last")
    searched = [config.loss for name, config in of.items() if name.startswith("gamma_")]
    gammas = {row["gamma"] for row in paper.rows("1b").values()}
    assert {(loss.gamma, loss.alpha) for loss in searched} == {(g, a) for g in gammas for a in tables.SEARCHED}
    assert len(searched) == 56 and tables.SEARCHED[0] == 0.01 and tables.SEARCHED[-1] == 0.999


@pytest.mark.parametrize("file, table, row", [
    ("r50_600", "1b", "gamma_2"), ("r50_600_ce", "1a", "alpha_.50"), ("r50_600_ce_balanced", "1a", "alpha_.75"),
    ("r101_600", "1d", "fl"), ("r101_600_ohem", "1d", "ohem_128_.5"), ("r101_600_ohem_1to3", "1d", "ohem_1to3_128_.5"),
    *((name, "1e", name) for name in paper.rows("1e")),
    ("r101_800_1p5x", "2", "retinanet_r101"), ("x101_32x8d_800_1p5x", "2", "retinanet_x101"),
])  # fmt: skip
def test_rows_are_the_shipped_configurations(file, table, row):
    assert configs(table, "paper")[row][1] == load_config(ROOT / f"configs/{file}.json")


@pytest.mark.parametrize("table", tables.NAMES)
def test_rows_of_a_table_differ_at_small_scale_as_in_the_paper(table):
    """In the same keys, between each two rows; but for what a scale of its own needs."""
    own = {"data.short_side", "data.max_side", "mining.batch_size", "train.iterations", "train.drops", "model.weights"}
    own |= {key for key in tables.PLAIN_SGD} | {"data.scale_jitter"}
    small, large = ({name: flat(config.to_dict()) for name, (_, config) in configs(table, scale).items()}
                    for scale in ("small", "paper"))  # fmt: skip
    names = [name for name in small if name in large]
    assert len(names) >= 2
    for name in names[1:]:
        differ = [{key for key in of[name] if of[name][key] != of[names[0]][key]} - own for of in (small, large)]
        assert differ[0] == differ[1], name
    alone = {name: config for name, config in small.items() if "_alpha_0." not in name}  # the search has `fl`, too
    assert len({json.dumps(config) for config in alone.values()}) == len(alone)


def test_mining_keeps_its_share_of_the_anchors_at_small_scale():
    from retinanet_keras.anchors import level_sizes

    share = []
    for scale, height, width in (("paper", 608, 1024), ("small", 192, 192)):
        config = configs("1d", scale)["ohem_128_.5"][1]
        share.append(config.mining.batch_size / sum(level_sizes(height, width, config.anchors)))
    assert share[1] == pytest.approx(share[0], rel=0.1)


def test_every_row_has_a_baseline_at_its_scale():
    for table in tables.NAMES:
        for scale in tables.SCALES:
            names = [row.name for row in tables.rows(table, scale)]
            assert len(set(names)) == len(names)
            assert {tables.baseline(table, row, scale) for row in tables.rows(table, scale)} <= set(names)


# Commands


@pytest.mark.parametrize("scale", tables.SCALES)
@pytest.mark.parametrize("table", tables.NAMES)
def test_dry_runs(table, scale, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["retinanet_keras", "experiments", table, "--dry-run", "--scale", scale])
    assert not command.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [row.name for row in tables.rows(table, scale)]
    for line in lines:
        assert re.search(r"\| [\d,]+ iterations of \d+ images, shorter side \d+ \| paper: .", line)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_what_differs_and_what_the_paper_got():
    (line,) = runner.plan("1d", "paper", only=["ohem_1to3_256_.5"])
    assert "mining.ratio=3" in line and "mining.batch_size=256" in line and "90,000 iterations of 16 images" in line
    assert "shorter side 600" in line and line.endswith("paper: AP 28.3, AP50 42.4, AP75 30.3")
    (line,) = runner.plan("text", "small", only=["no_prior"], overrides=["train.iterations=7"])
    assert "model.prior=0.5" in line and "7 iterations of 8" in line and "diverging during training" in line
    assert [line.split(":")[0] for line in runner.plan("text", "small", only=["pi"])] == [
        "pi_.001", "pi_.01", "pi_.1", "pi_.5"
    ]  # fmt: skip


@pytest.mark.parametrize("given, answer", [
    (["1a", "--only", "alpha_.7"], "no row alpha_.7 at small scale. Choose from alpha_.10, .*alpha_.75"),
    (["text", "--scale", "paper", "--only", "pi_.5"], "no row pi_.5 at paper scale.*groups initialization, pi, focal"),
    (["1a", "--seeds", "0"], "--seeds"),
    (["1a", "--time"], "table 1e"),
    (["1a", "--dry-run", "--set", "train.iteration=3"], "Did you mean train.iterations"),
])  # fmt: skip
def test_what_cannot_be_is_refused(given, answer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["retinanet_keras", "experiments", *given])
    with pytest.raises(UserError, match=answer):
        command.main()
    assert list(tmp_path.iterdir()) == []


# Runs


def wait_for(path, process, seconds=1200):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def start(to, *more):
    arguments = ["experiments", "3", "--only", "ce", "fl", "--to", str(to), *more, "--set", *TINY]
    return subprocess.Popen([sys.executable, "-m", "retinanet_keras", *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_table_that_is_killed_goes_on_without_redoing_or_losing_a_row(tmp_path, number):
    """In the second row's training. After SIGKILL that training continues alone, and the next start waits for it."""
    process = start(tmp_path)
    place = tmp_path / "3"
    wait_for(place / "fl/0/config.json", process)  # the second row has begun
    first = (place / "ce/0/result.json").read_text()
    logged = (place / "ce/0/log.csv").stat().st_mtime_ns
    process.send_signal(number)
    said = process.communicate()[0]
    assert process.returncode == (-9 if number == signal.SIGKILL else 143), said
    again = start(tmp_path)
    said = again.communicate(timeout=1200)[0]
    assert again.returncode == 0, said
    assert "3 ce, seed 0 (1 of 2): AP" in said and "3 ce, seed 0 (1 of 2): training" not in said
    assert (place / "ce/0/result.json").read_text() == first
    assert (place / "ce/0/log.csv").stat().st_mtime_ns == logged
    steps = [row["step"] for row in csv.DictReader((place / "fl/0/log.csv").open()) if row["loss"]]
    assert steps == ["2", "4"]
    text = (place / "table.txt").read_text()
    assert text in said and re.search(r"^fl +the paper's settings +ce +\d", text, re.M)
    assert re.search(r"^fl_star_2_1 .*not run", text, re.M)


@pytest.mark.slow
def test_a_row_that_diverges_is_a_result(tmp_path, capsys):
    wild = ["train.optimizer=sgd", "train.learning_rate=1e20", "train.warmup=0", "train.clip_norm=null"]
    for _ in range(2):
        runner.run_table("1b", "small", tmp_path, only=["gamma_2"], overrides=[*TINY, *wild])
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "1b/gamma_2/0/result.json").read_text())
    assert 1 < result["diverged"] <= 4 and said.count(f"diverged in step {result['diverged']}\n") == 2
    assert said.count("training; output in") == 1  # it is not tried again
    assert f"diverged: 1 of 1, in step {result['diverged']}" in (tmp_path / "1b/table.txt").read_text()


@pytest.mark.slow
def test_other_failures_are_no_result(tmp_path):
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(UserError, match="3 ce, seed 0.* status 2 and said: error: .*is a file.*resume from there"):
        runner.run_table("3", "small", tmp_path, only=["ce"], overrides=TINY)
    assert not (tmp_path / "3/ce/0/result.json").exists()


def test_a_folder_of_other_settings_is_left_alone(tmp_path):
    config = tmp_path / "3/ce/config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{}")
    with pytest.raises(UserError, match="other settings.*--to"):
        runner.run_table("3", "small", tmp_path, overrides=TINY)
    assert config.read_text() == "{}" and not (tmp_path / "3/ce/0").exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"AP": 1}', b'{"diverged": "x"}', b'{"AP": 1, "AP": 2}'])
def test_a_damaged_result_is_set_aside_and_the_row_finished_again(tmp_path, monkeypatch, content, caplog):
    folder = tmp_path / "ce/0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_bytes(content)
    monkeypatch.setattr(runner, "_run", lambda command, log, lock: (0, ""))
    monkeypatch.setattr(runner, "_result", lambda *_: metrics(0.25))
    assert runner.train_row(tmp_path / "ce", 0, "ce") == metrics(0.25)
    assert "result.json is damaged" in caplog.text and json.loads((folder / "result.json").read_text()) == metrics(0.25)
    assert (folder / "result.json.damaged").read_bytes() == content
    (folder / "result.json").write_bytes(content)
    put(tmp_path, "fl", 0, metrics(0.3))
    assert list(measurements.results(tmp_path)) == ["fl"] and "the table does not include it" in caplog.text


def test_a_row_that_another_process_trains_is_waited_for(tmp_path, capsys):
    folder = tmp_path / "ce/0"
    folder.mkdir(parents=True)
    code = (
        "import sys, time; from retinanet_keras.storage import disk\n"
        "with disk.locked(sys.argv[1], 'ce', name='.row.lock'):\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
        "    disk.write(sys.argv[1] + '/result.json', sys.argv[2])"
    )
    other = subprocess.Popen([sys.executable, "-c", code, folder, json.dumps(metrics(0.5))],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)  # fmt: skip
    assert other.stdout.readline() == "held\n"
    threading.Timer(0.5, other.communicate, ["go\n"]).start()
    assert runner.train_row(tmp_path / "ce", 0, "ce") == metrics(0.5)
    assert "ce: another process trains it (ce, process" in capsys.readouterr().out


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"--to: {tmp_path / 'file'} is not a folder"):
        runner.run_table("3", "small", tmp_path / "file", overrides=TINY)


@pytest.mark.parametrize("content", ["", "[]", '{"rows": 3}', '{"rows": {"a": "b"}}'])
def test_a_damaged_file_of_times_is_told(tmp_path, content):
    (tmp_path / "time.json").write_text(content)
    with pytest.raises(UserError, match="time.json"):
        measurements.read_times(tmp_path)


# Output


def put(place, row, seed, result, losses=((2, 9.0), (4, 3.0))):
    folder = place / row / str(seed)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "log.csv").write_text("step,loss,AP\n" + "".join(f"{s},{v},\n" for s, v in losses) + "4,,0.1\n")


def metrics(ap):
    return {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2, "APs": ap, "APm": ap, "APl": None}


def test_means_spread_and_differences(tmp_path):
    """Worked by hand: FL's APs 30, 31, 35 of three seeds; CE's 20 and 24, its third diverged."""
    for seed, ap in enumerate((0.30, 0.31, 0.35)):
        put(tmp_path, "fl", seed, metrics(ap))
    for seed, ap in enumerate((0.20, 0.24)):
        put(tmp_path, "ce", seed, metrics(ap))
    put(tmp_path, "ce", 2, {"diverged": 17}, losses=((2, 90.0), (4, 1e6)))
    text = results_page.write(tmp_path, "3", "small")
    rows = {row["row"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert list(rows) == ["ce", "fl", "fl_star_2_1", "fl_star_4_0"]
    fl, ce = rows["fl"], rows["ce"]
    assert float(fl["AP"]) == pytest.approx(32) and float(fl["AP_deviation"]) == pytest.approx(7**0.5, abs=1e-6)
    assert float(fl["AP50"]) == pytest.approx(64) and fl["APl"] == "" and fl["AP_of_seeds"] == "30.0 31.0 35.0"
    assert float(ce["AP"]) == pytest.approx(22) and ce["diverged"] == "1" and ce["diverged_in_steps"] == "17"
    assert ce["AP_of_seeds"] == "20.0 24.0 -" and ce["seeds"] == "3"
    assert float(fl["difference"]) == pytest.approx(10) and float(ce["difference"]) == 0
    assert float(fl["paper_difference"]) == pytest.approx(2.9) and fl["paper_AP50"] == "52.5"
    assert float(ce["loss_highest"]) == pytest.approx((9 + 9 + 1e6) / 3, rel=1e-6)
    assert rows["fl_star_4_0"]["AP"] == "" and rows["fl_star_4_0"]["paper_AP"] == "33.9"
    assert "32.0 +-2.6" in text and "+10.0" in text and "+2.9" in text and "diverged: 1 of 3, in step 17" in text
    assert "ours: measured at small scale, on generated images" in text and "paper: as printed, on COCO minival" in text
    page = (tmp_path / "table.html").read_text()
    assert page.count("<tr>") == 5 and "32.0 +-2.6" in page and "data:image/png;base64," in page
    assert '<th class="paper">paper AP</th>' in page


def test_the_text_has_the_papers_words_and_the_other_methods_of_table_2_their_numbers(tmp_path):
    put(tmp_path / "text", "fl", 0, metrics(0.4))
    put(tmp_path / "text", "fl_alpha_.5", 0, metrics(0.39))
    text = results_page.write(tmp_path / "text", "text", "small")
    (line,) = re.findall(r"^fl_alpha_.5 .*$", text, re.M)
    assert "-1.0" in line and "-0.4" in line and ".4 AP lower" in line
    assert "hinge" in text and "gamma_2_alpha" not in text and "the best is" not in text
    for alpha, ap in ((0.25, 0.3), (0.5, 0.4), (0.75, 0.1)):
        put(tmp_path / "text", f"gamma_2_alpha_{alpha}", 0, metrics(ap))
    text = results_page.write(tmp_path / "text", "text", "small")
    assert "gamma 2: of 3 alphas the best is 0.5, AP 40.0; the paper's is 0.25" in text
    assert re.search(r"^gamma_2_alpha_0.75 +loss.alpha=0.75 +gamma_2_alpha_0.25 +10.0 .* -20.0", text, re.M)
    put(tmp_path / "2", "retinanet_r101", 0, metrics(0.0))
    (tmp_path / "2/retinanet_r101/config.json").write_text('{"train": {"iterations": 4}}')
    text = results_page.write(tmp_path / "2", "2", "small")
    (line,) = re.findall(r"^yolov2 .*$", text, re.M)
    assert "not trained here: YOLOv2" in line and "not run" not in line and "21.6" in line
    assert "each row: 4 iterations of 16 images" in text  # which says what its numbers are worth


def test_images_of_table_1e_are_of_4_to_3():
    sizes = []

    def detect(image, _):
        sizes.append(image.shape[1:3])
        return {"scores": tf.zeros(1)}

    for _, config in configs("1e", "paper").values():
        timing.call(detect, config.data.short_side, config.data.max_side)()
    assert sizes == 2 * [(400, 533), (500, 667), (600, 800), (700, 933), (800, 1067)]


def test_models_are_timed_in_turn():
    called = []
    times = timing.medians({name: lambda name=name: called.append(name) for name in "ab"}, rounds=2)
    assert called == list("ababab") and all(ms >= 0 for ms in times.values())


@pytest.mark.slow
def test_times_of_table_1e(tmp_path):
    """Measured with models of a hundredth of the size on images of an eighth; the table's by hand."""
    small = {"width": 8, "fpn_channels": 8, "head_depth": 0}
    content = timing.measure(tmp_path, only=["r50_400", "r50_600"], rounds=1, shrink=8, smaller=small)
    assert content == json.loads((tmp_path / "time.json").read_text())
    assert list(content["rows"]) == ["r50_400", "r50_600"] and all(ms > 0 for ms in content["rows"].values())
    (tmp_path / "time.json").write_text(json.dumps({
        "about": "by hand", "rows": {name: 100.0 * (n + 1) for n, name in enumerate(paper.rows("1e"))}
    }))  # fmt: skip
    text = results_page.write(tmp_path, "1e", "small")
    rows = {row["row"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert rows["r101_800"]["relative_time"] == "10.0" and rows["r50_400"]["paper_relative_time"] == "1.0"
    assert float(rows["r101_800"]["paper_relative_time"]) == pytest.approx(198 / 64, abs=1e-6)
    assert "time: by hand" in text and re.search(r"^r101_800 .* 1000 +10.00 .* 198 +3.09", text, re.M)
