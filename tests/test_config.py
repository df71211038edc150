"""The configuration: the paper's defaults, and every way a file or an override can be wrong."""

import copy
import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinanet_keras.config import VERSION, Config, config_from_dict, load_config
from retinanet_keras.config_schema import describe
from retinanet_keras.errors import ConfigError

pytestmark = pytest.mark.check

ROOT = Path(__file__).parents[1]
NO_WEIGHTS = {"model": {"weights": None}}


def error_of(tree):
    with pytest.raises(ConfigError) as caught:
        config_from_dict(tree)
    return str(caught.value)


def write(folder, tree, name="c.json"):
    path = folder / name
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return path


# Defaults


def test_defaults_are_the_papers():
    config = Config()
    assert (config.anchors.size, config.anchors.scales, config.anchors.ratios) == (4.0, 3, (0.5, 1.0, 2.0))
    assert config.anchors.per_cell == 9
    assert (config.data.short_side, config.data.max_side, config.data.flip) == (800, 1333, 0.5)
    assert (config.data.scale_jitter, config.data.vertical_flip) == ((1.0, 1.0), 0)
    assert (config.data.aspect_jitter, config.data.color_jitter) == (1, 0)
    assert (config.model.backbone, config.model.weights, config.model.width) == ("resnet50", "imagenet", 64)
    assert (config.model.norm, config.model.freeze_at) == ("frozen", 2)
    assert (config.model.fpn_channels, config.model.head_depth, config.model.prior) == (256, 4, 0.01)
    assert (config.targets.positive_iou, config.targets.negative_iou) == (0.5, 0.4)
    assert (config.loss.alpha, config.loss.gamma, config.loss.normalizer) == (0.25, 2.0, "image")
    assert (config.loss.box_beta, config.loss.box_weight) == (0.11, 1.0)
    train = config.train
    assert (train.iterations, train.batch_size, train.learning_rate, train.drops) == (
        90_000,
        16,
        0.01,
        (60_000, 80_000),
    )
    assert (train.optimizer, train.momentum, train.weight_decay, train.clip_norm) == ("sgd", 0.9, 1e-4, None)
    assert (train.schedule, train.warmup, train.bias_rate) == ("step", 500, 2.0)
    detection = config.detection
    assert (detection.score_threshold, detection.pre_nms_top_k, detection.nms_iou) == (0.05, 1000, 0.5)
    assert (detection.max_detections, config.eval.keep) == (100, "last")


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load_config(write(tmp_path, {})) == Config()


def test_the_defaults_pass_their_own_limits():
    assert config_from_dict(Config().to_dict()) == Config()


def test_round_trip_through_json():
    tree = {
        "data": {"scale_jitter": [0.5, 2], "shapes": {"side": 128}},
        "model": {"weights": None, "backbone": "resnet18"},
        "loss": {"alpha": None},
        "train": {"drops": [5], "clip_norm": 10, "jit_compile": True},
    }
    config = config_from_dict(tree)
    assert config.data.scale_jitter == (0.5, 2.0) and config.train.drops == (5,) and config.data.shapes.side == 128
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["version"] == VERSION


def test_integers_become_floats_where_a_float_is_meant():
    gamma = config_from_dict({"loss": {"gamma": 2}}).loss.gamma
    assert gamma == 2.0 and isinstance(gamma, float)


def test_the_dict_given_is_left_alone():
    tree = {"version": 1, "train": {"iterations": 3}}
    config_from_dict(tree)
    assert tree == {"version": 1, "train": {"iterations": 3}}


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.iterations = 3


# Keys


@pytest.mark.parametrize(
    "tree, key, nearest",
    [
        ({"train": {"iteration": 5}}, "train.iteration", "train.iterations"),
        ({"trian": {"iterations": 5}}, "trian", "train"),
        ({"data": {"shapes": {"sides": 64}}}, "data.shapes.sides", "data.shapes.side"),
        ({"train": {"gamma": 1.0}}, "train.gamma", "loss.gamma"),  # the right leaf in the wrong section
        ({"data": {"nms_iou": 0.5}}, "data.nms_iou", "detection.nms_iou"),
        ({"learning_rate": 0.1}, "learning_rate", "train.learning_rate"),
    ],
)
def test_unknown_keys_name_the_path_and_the_nearest_key(tree, key, nearest):
    message = error_of(tree)
    assert f"unknown key {key}." in message
    assert message.endswith(f"Did you mean {nearest}?")


def test_an_unknown_key_like_no_other_names_the_sections():
    message = error_of({"qqqqqqq": 1})
    assert (
        "unknown key qqqqqqq." in message
        and "data, detection, eval, loss, mining, model, serving, strategy, targets, train" in message
    )


# What belongs together


@pytest.mark.parametrize("tree, answer", [
    ({"mining": {"ratio": 3}}, "mining.ratio: expected mining.batch_size above 0"),
    ({"loss": {"kind": "focal_star", "gamma": 0}}, "loss.gamma: expected a number above 0"),
    ({"detection": {"pad_multiple": 48}}, "a multiple of 32, got 48"),
    ({"loss": {"kind": "focal_loss"}}, "Did you mean focal"),
    ({"anchors": {"rounding": "integer"}}, "Did you mean integers"),
    ({"detection": {"clip": "after"}}, "expected one of before_nms, after_nms, inclusive"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(tree, answer):
    assert answer in error_of(tree)


# Values


@pytest.mark.parametrize(
    "section, name, value, expected",
    [
        ("train", "iterations", True, "a whole number, got true"),
        ("train", "iterations", 1.5, "a whole number, got 1.5"),
        ("train", "iterations", "100", 'a whole number, got "100"'),
        ("train", "iterations", None, "a whole number, got null"),
        ("train", "learning_rate", True, "a number, got true"),
        ("train", "learning_rate", "0.1", 'a number, got "0.1"'),
        ("train", "learning_rate", float("nan"), "a finite number, got nan"),
        ("train", "learning_rate", float("inf"), "a finite number, got inf"),
        ("train", "iterations", float("nan"), "a whole number, got NaN"),
        ("train", "clip_norm", "x", 'a number or null, got "x"'),
        ("train", "jit_compile", 1, "true or false or a string, got 1"),
        ("train", "jit_compile", "no", "one of True, False, auto"),
        ("data", "dir", 5, "a string, got 5"),
        ("data", "keep_empty", 1, "true or false, got 1"),
        ("model", "backbone", "resnet34", "one of resnet18, resnet50, resnet101, resnet152"),
        ("model", "weights", 5, "a string or null, got 5"),
        ("train", "drops", 60000, "a list of one or more a whole number values, got 60000"),
        ("train", "drops", [], "a list of one or more"),
        ("train", "drops", "60", "a list of one or more"),
        ("data", "scale_jitter", [1.0], "a list of 2 a number values, got [1.0]"),
        ("data", "scale_jitter", [1, 2, 3], "a list of 2"),
    ],
)
def test_wrong_values_name_the_key_and_what_was_expected(section, name, value, expected):
    message = error_of({section: {name: value}})
    assert message.startswith(f"{section}.{name}: expected ")
    assert expected in message


def test_elements_of_lists_are_checked_and_named():
    assert error_of({"train": {"drops": [5, True]}}).startswith("train.drops[1]: expected a whole number, got true")
    assert error_of({"anchors": {"ratios": [1.0, 0]}}).startswith("anchors.ratios[1]: expected a number above 0, got 0")


@pytest.mark.parametrize(
    "section, name, bad, words, good",
    [
        ("train", "iterations", 0, "at least 1", 1),
        ("train", "learning_rate", 0, "a number above 0", 1e-9),
        ("train", "momentum", 1, "a number below 1", 0),
        ("data", "flip", 1.01, "at most 1", 1),
        ("data", "flip", -0.01, "at least 0", 0),
        ("model", "prior", 0, "a number above 0", 0.5),
        ("model", "prior", 1, "a number below 1", 0.99),
        ("model", "freeze_at", 6, "at most 5", 5),
        ("model", "fpn_channels", 7, "at least 8", 8),
        ("loss", "alpha", 1.5, "at most 1", None),
    ],
)
def test_limits(section, name, bad, words, good):
    assert error_of({section: {name: bad}}).startswith(f"{section}.{name}: expected {words}, got {bad}")
    assert getattr(getattr(config_from_dict({section: {name: good}}), section), name) == good


def test_a_wrong_choice_names_the_nearest():
    assert error_of({"train": {"schedule": "cosin"}}).endswith("Did you mean cosine?")


@pytest.mark.parametrize("value", [5, [], None, "x"])
def test_a_section_must_be_an_object(value):
    assert error_of({"train": value}).startswith("train: expected a JSON object of settings, got")


# Together


def test_negative_iou_not_above_positive_iou():
    message = error_of({"targets": {"positive_iou": 0.5, "negative_iou": 0.6}})
    assert "targets.negative_iou" in message and "targets.positive_iou, 0.5, got 0.6" in message
    config_from_dict({"targets": {"positive_iou": 0.5, "negative_iou": 0.5}})


@pytest.mark.parametrize("drops", [[80, 60], [60, 60]])
def test_drops_must_increase(drops):
    assert f"expected increasing steps, got {drops}" in error_of({"train": {"drops": drops}})


def test_jitter_has_the_smaller_factor_first():
    assert "data.scale_jitter" in error_of({"data": {"scale_jitter": [2.0, 1.0]}})


def test_sizes_of_shapes_have_the_smaller_share_first():
    assert "data.shapes.size: expected the smaller fraction first" in error_of(
        {"data": {"shapes": {"size": [0.5, 0.1]}}}
    )


@pytest.mark.parametrize("rounding", ["cell", "integers"])
def test_other_frameworks_have_no_anchors_on_the_last_layer_alone(rounding):
    assert "anchors.rounding" in error_of({"anchors": {"levels": "last", "rounding": rounding}})


def test_annotations_need_the_split():
    assert "{split}" in error_of({"data": {"annotations": "all.json"}})


@pytest.mark.parametrize("change", [{"backbone": "resnet18"}, {"norm": "batch"}, {"norm": "group"}, {"width": 32}])
def test_imagenet_weights_fit_one_kind_of_backbone(change):
    assert "set model.weights=null" in error_of({"model": change})
    config_from_dict({"model": {**change, "weights": None}})
    config_from_dict({"model": {**change, "weights": "mine.weights.h5"}})


# Versions and files


def test_a_newer_version_is_refused():
    message = error_of({"version": VERSION + 1})
    assert f"version {VERSION + 1}" in message and "Upgrade" in message


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None])
def test_a_version_is_a_whole_number(version):
    assert error_of({"version": version}).startswith("version: expected a whole number from 1 to")


def test_a_missing_file_names_a_near_one(tmp_path):
    write(tmp_path, {}, "r50_800.json")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "r50_80.json")
    assert (
        str(caught.value)
        == f"No configuration at {tmp_path / 'r50_80.json'}. Did you mean {tmp_path / 'r50_800.json'}?"
    )
    with pytest.raises(ConfigError, match=r"No configuration at .*no/such\.json\.$"):
        load_config(tmp_path / "no/such.json")


def test_text_that_is_not_json_names_line_and_column(tmp_path):
    path = write(tmp_path, '{\n  "train": {"iterations": 5,}\n}')
    with pytest.raises(ConfigError, match=r"c\.json is not valid JSON: line 2, column \d+"):
        load_config(path)


def test_other_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a JSON object of sections, got \[1, 2\]"):
        load_config(write(tmp_path, "[1, 2]"))
    (tmp_path / "latin.json").write_bytes(b'{"data": "\xe9"}')
    with pytest.raises(ConfigError, match="cannot be read|is not UTF-8"):
        load_config(tmp_path / "latin.json")
    with pytest.raises(ConfigError, match="cannot be read|is not UTF-8"):
        load_config(tmp_path)


@pytest.mark.parametrize("text, message", [
    ('{"train": {"seed": 1, "seed": 2}}', "c.json is not valid JSON: the key 'seed' occurs twice in one object"),
    ('{"train": {}, "train": {}}', "the key 'train' occurs twice"),
    ('{"a":' * 200_000 + "1" + "}" * 200_000, "nested too deeply"),
    ('{"data": ' + "[" * 900 + "]" * 900 + "}", "data: expected a JSON object of settings, got"),
    ('{"train": {"iterations": ' + "1" * 5000 + "}}", "needs more than 64 bits"),
    ('{"train": {"learning_rate": 1' + "0" * 400 + "}}", "needs more than 64 bits"),
    ('{"train": {"learning_rate": 1e400}}', "train.learning_rate: expected a finite number, got"),
    ('{"serving": {"max_pixels": 9000000000000000000}}', "serving.max_pixels: expected at most"),
    ('{"data": {"dir": "half \\ud800"}}', r'data.dir: expected text that is valid in a file name, got "half \\ud800"'),
    ('{"data": {"dir": "null \\u0000"}}', "data.dir: expected text that is valid in a file name"),
    ('{"\\u001b[31m' + "x" * 100_000 + '": 1}', r"unknown key \\x1b\[31mx+…\."),
    ("", "line 1, column 1"),
])  # fmt: skip
def test_hostile_files_are_refused_in_a_sentence(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_a_byte_order_mark_is_accepted(tmp_path):
    assert load_config(write(tmp_path, '\ufeff{"train": {"seed": 3}}')).train.seed == 3


def test_numbers_without_bounds_are_refused_in_a_dict_too():
    assert error_of({"train": {"learning_rate": 10**5000}}).startswith("train.learning_rate: expected a finite number")
    assert error_of({"train": {"seed": -(10**5000)}}).startswith("train.seed: expected at least 0, got a int that")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = [row[0] for row in describe(Config)]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*KEYS, *(key.split(".")[0] for key in KEYS), "x.y"]), JSON_VALUES, max_size=3),
       st.randoms(use_true_random=False))  # fmt: skip
def test_any_values_make_a_configuration_or_one_sentence(made_up, random):
    """What is accepted is what comes back from the JSON that it is kept in."""
    tree = {}
    for key, value in made_up.items():
        *sections, last = key.split(".")
        at = tree
        for section in sections:
            if not isinstance(at.get(section), dict):
                at[section] = {}
            at = at[section]
        at[last] = copy.deepcopy(value)
    text = json.dumps(tree)
    if random.random() < 0.3:  # cut off, or a byte changed
        place = random.randrange(len(text))
        text = text[:place] + random.choice(("", '"', "1", "{", "\x00", ",", "]")) + text[place + 1 :]
    try:
        config = load_config_of(text)
    except ConfigError as error:
        assert len(str(error)) < 1000
    else:
        assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KEYS), st.text(st.characters(exclude_characters="\0"), max_size=12)
       | JSON_VALUES.map(json.dumps))  # fmt: skip
def test_any_override_is_taken_or_refused_in_one_sentence(key, text):
    try:
        load_config_of("{}", [f"{key}={text}"])
    except ConfigError as error:
        assert len(str(error)) < 1000


def load_config_of(text, overrides=()):
    with tempfile.TemporaryDirectory() as folder:
        return load_config(write(Path(folder), text), overrides)


def test_errors_in_a_file_name_the_file(tmp_path):
    path = write(tmp_path, {"train": {"iterations": 0}})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: train.iterations: expected at least 1, got 0"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.name)
def test_shipped_configurations_load(path):
    config = load_config(path)
    assert config_from_dict(config.to_dict()) == config
    assert json.loads(path.read_text())["version"] == VERSION


# Overrides


def override(tmp_path, *overrides, tree=NO_WEIGHTS):
    return load_config(write(tmp_path, tree), overrides)


def test_overrides_are_json_or_bare_strings(tmp_path):
    config = override(
        tmp_path, "train.batch_size=4", "train.drops=[10, 20]", "train.schedule=cosine", 'train.optimizer="adamw"',
        "loss.alpha=null", "data.keep_empty=true", "train.jit_compile=auto", "data.shapes.seed=7",
        "model.weights=w.weights.h5",
    )  # fmt: skip
    assert (config.train.batch_size, config.train.drops) == (4, (10, 20))
    assert (config.train.schedule, config.train.optimizer, config.loss.alpha) == ("cosine", "adamw", None)
    assert (config.data.keep_empty, config.train.jit_compile) == (True, "auto")
    assert (config.data.shapes.seed, config.model.weights) == (7, "w.weights.h5")


def test_the_last_override_wins_over_the_file(tmp_path):
    config = override(tmp_path, "train.iterations=5", "train.iterations=6", tree={"train": {"iterations": 4}})
    assert config.train.iterations == 6


@pytest.mark.parametrize("text", ["2017", "true", "null", "1e5", "[1]", "a=b", ""])
def test_string_settings_take_the_text_as_it_is(tmp_path, text):
    assert override(tmp_path, f"data.dir={text}").data.dir == text
    assert override(tmp_path, f'data.dir="{text}"').data.dir == text


@pytest.mark.parametrize("text", ["train.batch_size", "=4", "", "--batch=4"])
def test_malformed_overrides(tmp_path, text):
    with pytest.raises(ConfigError, match="section.key=value|unknown key"):
        override(tmp_path, text)


def test_wrong_overrides_are_told_as_in_a_file(tmp_path):
    with pytest.raises(ConfigError, match="unknown key train.batchsize. Did you mean train.batch_size"):
        override(tmp_path, "train.batchsize=4")
    with pytest.raises(ConfigError, match='train.batch_size: expected a whole number, got "four"'):
        override(tmp_path, "train.batch_size=four")
    with pytest.raises(ConfigError, match="train.learning_rate: expected a finite number"):
        override(tmp_path, "train.learning_rate=NaN")
    with pytest.raises(ConfigError, match="data: expected a JSON object"):
        override(tmp_path, "data=5")
    with pytest.raises(ConfigError, match="train.seed: expected a whole number"):
        override(tmp_path, "train.seed.x=5")
    with pytest.raises(ConfigError, match="expected train to be a section in this file, got 5"):
        override(tmp_path, "train.seed=5", tree={"train": 5})


# Documentation


def test_every_setting_is_documented_with_its_source():
    rows = describe(Config)
    keys = [row[0] for row in rows]
    flat = []

    def walk(tree, prefix):
        for name, value in tree.items():
            walk(value, f"{prefix}{name}.") if isinstance(value, dict) else flat.append((prefix + name, value))

    tree = Config().to_dict()
    del tree["version"]
    walk(tree, "")
    assert keys == [key for key, _ in flat]
    assert [json.loads(default) for _, default, _, _ in rows] == [value for _, value in flat]
    for key, _, doc, source in rows:
        assert doc and not doc.endswith("."), key
        assert source, key


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("model.weights=imagnet", 'model.weights: expected "imagenet".*Did you mean "imagenet"'),
        ("data.images={year}", "data.images: expected no other placeholder"),
        ("data.annotations={split}_{x}.json", "data.annotations: expected no other placeholder"),
        ("train.seed=8589934592", "train.seed: expected at most"),
    ],
)
def test_values_that_would_fail_later_are_refused(override, answer, tmp_path):
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(ConfigError, match=answer):
        load_config(tmp_path / "c.json", [override])


# The configurations


def configuration(name):
    return load_config(ROOT / f"configs/{name}.json")


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize(("scale", "cap"), [(400, 667), (500, 833), (600, 1000), (700, 1166), (800, 1333)])
def test_the_rows_of_table_1e_differ_from_the_defaults_in_depth_and_scale_only(depth, scale, cap):
    """The cap keeps the ratio of 1333 to 800."""
    assert abs(cap - scale * 1333 / 800) <= 0.5
    data = dataclasses.replace(Config().data, short_side=scale, max_side=cap)
    model = dataclasses.replace(Config().model, backbone=f"resnet{depth}")
    assert configuration(f"r{depth}_{scale}") == dataclasses.replace(Config(), data=data, model=model)


@pytest.mark.parametrize("name", ["r101_800_1p5x", "x101_32x8d_800_1p5x"])
def test_the_rows_of_table_2_train_half_as_long_again_with_jitter(name):
    config = configuration(name)
    assert (config.train.iterations, config.train.drops) == (135_000, (90_000, 120_000))
    assert config.data.scale_jitter == (0.8, 1.0) and config.data.short_side == 800
    assert config.model.backbone == ("resnet101" if name.startswith("r101") else "resnext101_32x8d")


@pytest.mark.parametrize(
    ("name", "backbone", "loss", "mining"),
    [
        ("r50_600_ce", "resnet50", ("cross_entropy", 0.5), (0, None)),
        ("r50_600_ce_balanced", "resnet50", ("cross_entropy", 0.75), (0, None)),
        ("r101_600_ohem", "resnet101", ("cross_entropy", None), (128, None)),
        ("r101_600_ohem_1to3", "resnet101", ("cross_entropy", None), (128, 3)),
    ],
)
def test_the_baselines_of_the_ablations(name, backbone, loss, mining):
    config = configuration(name)
    assert (config.data.short_side, config.data.max_side, config.model.backbone) == (600, 1000, backbone)
    assert (config.loss.kind, config.loss.alpha) == loss
    assert (config.mining.batch_size, config.mining.ratio, config.mining.nms_iou) == (*mining, 0.5)
