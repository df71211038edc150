"""RetinaNet as other frameworks have it: their files' names and shapes, their network, anchors and post-processing.

Nothing here comes from retinanet_keras, so a converter can be compared with it. A kind is one of KINDS; a file is a
dict of name -> array with random weights, convolution kernels [out, in / groups, height, width]. Anchors are in the
framework's own order: level (P3 first), row, column, then its own order in a cell. Boxes x1, y1, x2, y2 are continuous
pixels: a box that covers pixel 0 is 0..1.
"""

import numpy as np
import tensorflow as tf

KINDS = ("detectron", "detectron2", "torchvision_v1", "torchvision_v2")
DEPTHS = {"R50": (3, 4, 6, 3), "R101": (3, 4, 23, 3), "X101-32x8d": (3, 4, 23, 3)}
STRIDES = (8, 16, 32, 64, 128)

# BGR in Detectron and Detectron2, which divide by nothing; RGB, of pixels 0..1, in torchvision.
DETECTRON_MEAN = (102.9801, 115.9465, 122.7717)
DETECTRON2_MEAN = (103.530, 116.280, 123.675)
TORCHVISION_MEAN = (0.485, 0.456, 0.406)
TORCHVISION_STD = (0.229, 0.224, 0.225)

EPSILON = {"detectron2": 1e-5, "torchvision_v1": 0.0, "torchvision_v2": 1e-5}  # Detectron: only scale and shift

# The COCO category ids in use; torchvision's 91 classes are the ids themselves, 0 the background.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


# Files


def detectron(depth="R50", num_classes=80, seed=0, extras=False):
    """The blobs of a Detectron model. extras: what a trained file also carries, blobs that the network does not use."""
    weights = _random_file("detectron", depth, num_classes, seed)
    if extras:
        weights.update({f"{name}_momentum": np.ones_like(value) for name, value in weights.items()})
        weights.update(_classifier("pred" if depth[0] == "X" else "fc1000", np.random.default_rng(seed + 1)))
        weights["conv1_b"] = np.ones(64, "float32")
    return weights


def detectron2(num_classes=80, depth="R50", seed=0, buffers=False):
    """The state dict of a Detectron2 model. buffers: with the constants that older releases save too."""
    weights = _random_file("detectron2", depth, num_classes, seed)
    if buffers:
        weights["pixel_mean"] = np.array(DETECTRON2_MEAN, "float32").reshape(3, 1, 1)
        weights["pixel_std"] = np.ones((3, 1, 1), "float32")
        for i, stride in enumerate(STRIDES):
            weights[f"anchor_generator.cell_anchors.{i}"] = _cell_anchors("detectron2", stride).astype("float32")
    return weights


def torchvision_v1(num_classes=91, seed=0, older_names=False):
    """The state dict of retinanet_resnet50_fpn. older_names: as written before torchvision 0.13."""
    weights = _random_file("torchvision_v1", "R50", num_classes, seed)
    return {_older_name(name): value for name, value in weights.items()} if older_names else weights


def torchvision_v2(num_classes=91, seed=0):
    """The state dict of retinanet_resnet50_fpn_v2."""
    return _random_file("torchvision_v2", "R50", num_classes, seed)


def detectron_imagenet(depth="R50", seed=0, classifier="fc1000", statistics=False):
    """The blobs of an ImageNet backbone.

    classifier: name of the last layer, "fc1000" (converted from Caffe), "pred" (trained in Caffe2) or None.
    statistics: batch normalization with mean and variance, as in the copies that Detectron2 offers.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for conv, norm, shape, role in _backbone_layers("detectron", depth):
        weights[f"{conv}_w"] = _kernel("detectron", rng, shape, role)
        moments = _norm(rng, shape[0], role)
        if statistics:
            weights.update(
                zip((f"{norm}_{x}" for x in ("gamma", "beta", "running_mean", "running_var")), moments, strict=True)
            )
        else:
            weights.update(zip((f"{norm}_s", f"{norm}_b"), _affine(*moments, 0.0), strict=True))
    if classifier == "fc1000" and depth == "R50":  # Caffe's ResNet-50 has it, all zeros; the network leaves it out
        weights["conv1_b"] = np.zeros(64, "float32")
    if classifier:
        weights.update(_classifier(classifier, rng))
    return weights


def _classifier(name, rng):
    return {
        f"{name}_w": (0.01 * rng.standard_normal((1000, 2048))).astype("float32"),
        f"{name}_b": np.zeros(1000, "float32"),
    }


def _older_name(name):
    for part in ("inner_blocks", "layer_blocks"):
        for i in range(3):
            name = name.replace(f"{part}.{i}.0.", f"{part}.{i}.")
    for i in range(4):
        name = name.replace(f"_head.conv.{i}.0.", f"_head.conv.{2 * i}.")
    return name


# Names and shapes


def _block(kind, stage, i):
    """Names (conv, norm) of a bottleneck's three convolutions and of the one on its shortcut."""
    if kind == "detectron":
        convs = [f"res{stage}_{i}_branch{x}" for x in ("2a", "2b", "2c", "1")]
        return [(conv, f"{conv}_bn") for conv in convs]
    if kind == "detectron2":
        convs = [f"backbone.bottom_up.res{stage}.{i}.{x}" for x in ("conv1", "conv2", "conv3", "shortcut")]
        return [(conv, f"{conv}.norm") for conv in convs]
    base = f"backbone.body.layer{stage - 1}.{i}"
    shortcut = (f"{base}.downsample.0", f"{base}.downsample.1")
    return [(f"{base}.conv{n}", f"{base}.bn{n}") for n in (1, 2, 3)] + [shortcut]


def _stem(kind):
    if kind == "detectron":
        return "conv1", "res_conv1_bn"
    if kind == "detectron2":
        return "backbone.bottom_up.stem.conv1", "backbone.bottom_up.stem.conv1.norm"
    return "backbone.body.conv1", "backbone.body.bn1"


def _pyramid(kind, blocks):
    """Names of the lateral and the output convolutions of levels 3, 4, 5, and of those to P6 and P7."""
    if kind == "detectron":
        sums = [f"res{stage}_{blocks[stage - 2] - 1}_sum" for stage in (3, 4, 5)]
        laterals = [f"fpn_inner_{name}" + ("_lateral" if name[3] != "5" else "") for name in sums]
        return laterals, [f"fpn_{name}" for name in sums], ["fpn_6", "fpn_7"]
    if kind == "detectron2":
        laterals, outputs = [[f"backbone.fpn_{x}{level}" for level in (3, 4, 5)] for x in ("lateral", "output")]
        return laterals, outputs, ["backbone.top_block.p6", "backbone.top_block.p7"]
    laterals, outputs = [[f"backbone.fpn.{x}_blocks.{i}.0" for i in range(3)] for x in ("inner", "layer")]
    return laterals, outputs, ["backbone.fpn.extra_blocks.p6", "backbone.fpn.extra_blocks.p7"]


def _tower(kind, which):
    """Names (conv, norm or None) of the four layers of a subnet, which is "class" or "box", and of its last conv."""
    cls = which == "class"
    if kind == "detectron":
        base = "retnet_cls" if cls else "retnet_bbox"
        return [(f"{base}_conv_n{i}_fpn3", None) for i in range(4)], f"{base}_pred_fpn3"
    if kind == "detectron2":
        base = "head.cls_subnet" if cls else "head.bbox_subnet"
        return [(f"{base}.{2 * i}", None) for i in range(4)], "head.cls_score" if cls else "head.bbox_pred"
    base = "head.classification_head" if cls else "head.regression_head"
    convs = [(f"{base}.conv.{i}.0", f"{base}.conv.{i}.1" if kind == "torchvision_v2" else None) for i in range(4)]
    return convs, f"{base}.cls_logits" if cls else f"{base}.bbox_reg"


def _backbone_layers(kind, depth):
    """(conv, norm, kernel's shape, role) of every layer."""
    groups, base = (32, 256) if depth == "X101-32x8d" else (1, 64)
    yield *_stem(kind), (64, 3, 7, 7), "stem"
    width = 64
    for stage, count in enumerate(DEPTHS[depth], start=2):
        inner, out = base * 2 ** (stage - 2), 256 * 2 ** (stage - 2)
        for i in range(count):
            names = _block(kind, stage, i)
            yield *names[0], (inner, width, 1, 1), "inner"
            yield *names[1], (inner, inner // groups, 3, 3), "inner"
            yield *names[2], (out, inner, 1, 1), "last"
            if i == 0:
                yield *names[3], (out, width, 1, 1), "shortcut"
            width = out


def _random_file(kind, depth, num_classes, seed):
    rng = np.random.default_rng(seed)
    weights = {}

    def conv(name, shape, role, bias=True):
        weights[_key(kind, name, "weight")] = _kernel(kind, rng, shape, role)
        if bias:
            center, spread = {"class": (-4.0, 0.5)}.get(role, (0.0, 0.1))
            weights[_key(kind, name, "bias")] = (center + spread * rng.standard_normal(shape[0])).astype("float32")

    for name, norm, shape, role in _backbone_layers(kind, depth):
        conv(name, shape, role, bias=False)
        scale, shift, mean, variance = _norm(rng, shape[0], role)
        if kind == "detectron":
            weights[f"{norm}_s"], weights[f"{norm}_b"] = _affine(scale, shift, mean, variance, 0.0)
            continue
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = scale, shift
        weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"] = mean, variance
        if kind == "torchvision_v2":
            weights[f"{norm}.num_batches_tracked"] = np.array(1000, "int64")
    laterals, outputs, extras = _pyramid(kind, DEPTHS[depth])
    for name, width in zip(laterals, (512, 1024, 2048), strict=True):
        conv(name, (256, width, 1, 1), "lateral")
    for name in outputs:
        conv(name, (256, 256, 3, 3), "pyramid")
    conv(extras[0], (256, 256 if kind == "torchvision_v1" else 2048, 3, 3), "pyramid")
    conv(extras[1], (256, 256, 3, 3), "tower")
    for which, channels in (("class", 9 * num_classes), ("box", 9 * 4)):
        layers, last = _tower(kind, which)
        for name, norm in layers:
            conv(name, (256, 256, 3, 3), "tower", bias=norm is None)
            if norm:
                weights[f"{norm}.weight"] = rng.uniform(1.0, 2.0, 256).astype("float32")
                weights[f"{norm}.bias"] = (0.1 * rng.standard_normal(256)).astype("float32")
        conv(last, (channels, 256, 3, 3), which)
    return weights


def _key(kind, name, what):
    return f"{name}_{what[0]}" if kind == "detectron" else f"{name}.{what}"


# Variance out per mean square in, by the kernel's role. 2 keeps the mean square through a ReLU.
GAINS = {
    "stem": 2, "inner": 2, "last": 2, "shortcut": 2, "lateral": 0.3, "pyramid": 1, "tower": 2, "class": 1, "box": 0.01
}  # fmt: skip


def _kernel(kind, rng, shape, role):
    kernel = rng.standard_normal(shape, dtype="float32")
    if shape[-1] == 3:  # half of the energy in the middle, so that little dies in the padding of a tiny level
        kernel *= np.array([[1, 1, 1], [1, 8**0.5, 1], [1, 1, 1]], "float32") * np.float32(0.75)
    kernel *= np.float32((GAINS[role] / np.prod(shape[1:])) ** 0.5)
    if role == "stem" and kind in ("detectron", "detectron2"):  # pixels are not divided there
        kernel /= np.float32(60)
    return kernel


def _norm(rng, channels, role):
    """Scale, shift, mean, variance. The variances go down to 1e-3, where the wrong epsilon shows."""
    variance = 10 ** rng.uniform(-3, 0.3, channels)
    scale = rng.uniform(0.5, 1.5, channels) * variance**0.5 * (0.1 if role == "last" else 1)
    shift, mean = 0.1 * rng.standard_normal(channels), 0.1 * rng.standard_normal(channels)
    return [x.astype("float32") for x in (scale, shift, mean, variance)]


def _affine(scale, shift, mean, variance, epsilon):
    """The factor and summand that batch normalization comes to, float32."""
    factor = scale.astype("float64") / np.sqrt(variance.astype("float64") + epsilon)
    return factor.astype("float32"), (shift - mean * factor).astype("float32")


# The network


def forward(kind, weights, images):
    """Images [B, H, W, 3], RGB 0..255, H and W multiples of 32 -> logits [B, A, classes], deltas [B, A, 4], NumPy."""
    c3, c4, c5 = backbone(kind, weights, images)
    laterals, outputs, extras = _pyramid(kind, _blocks(kind, weights))
    inner = [_conv(kind, weights, c, name) for c, name in zip((c3, c4, c5), laterals, strict=True)]
    for i in (1, 0):
        inner[i] += tf.repeat(tf.repeat(inner[i + 1], 2, axis=1), 2, axis=2)
    levels = [_conv(kind, weights, x, name) for x, name in zip(inner, outputs, strict=True)]
    levels.append(_conv(kind, weights, levels[2] if kind == "torchvision_v1" else c5, extras[0], stride=2))
    levels.append(_conv(kind, weights, tf.nn.relu(levels[3]), extras[1], stride=2))
    return [_subnet(kind, weights, levels, which) for which in ("class", "box")]


def backbone(kind, weights, images):
    """Images as in `forward` -> C3, C4, C5, tensors [B, H / stride, W / stride, channels]."""

    def layer(x, names, stride=1):
        return _affine_channels(kind, weights, _conv(kind, weights, x, names[0], stride, bias=False), names[1])

    x = tf.nn.relu(layer(_normalize(kind, images), _stem(kind), stride=2))
    x = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=-np.inf)
    x = tf.nn.max_pool2d(x, 3, 2, "VALID")
    features = []
    for stage, count in enumerate(_blocks(kind, weights), start=2):
        for i in range(count):
            first, second, third, shortcut = _block(kind, stage, i)
            stride = 2 if i == 0 and stage > 2 else 1
            stride_in_1x1 = kind in ("detectron", "detectron2") and _groups(kind, weights) == 1
            y = tf.nn.relu(layer(x, first, stride if stride_in_1x1 else 1))
            y = tf.nn.relu(layer(y, second, 1 if stride_in_1x1 else stride))
            x = tf.nn.relu(layer(y, third) + (layer(x, shortcut, stride) if i == 0 else x))
        features.append(x)
    return features[1:]


def _subnet(kind, weights, levels, which):
    layers, last = _tower(kind, which)
    channels = weights[_key(kind, last, "weight")].shape[0] // 9
    out = []
    for x in levels:
        for conv, norm in layers:
            x = _conv(kind, weights, x, conv, bias=norm is None)
            x = tf.nn.relu(_group_norm(weights, x, norm) if norm else x)
        x = _conv(kind, weights, x, last)
        out.append(x.numpy().reshape(len(x), -1, channels))  # channel a * channels + k is anchor a's k-th
    return np.concatenate(out, axis=1)


def _normalize(kind, images):
    x = np.asarray(images, "float32")
    if kind == "detectron":
        return tf.constant(x[..., ::-1] - np.array(DETECTRON_MEAN, "float32"))
    if kind == "detectron2":
        return tf.constant(x[..., ::-1] - np.array(DETECTRON2_MEAN, "float32"))
    return tf.constant((x / 255 - np.array(TORCHVISION_MEAN, "float32")) / np.array(TORCHVISION_STD, "float32"))


def _conv(kind, weights, x, name, stride=1, bias=True):
    kernel = weights[_key(kind, name, "weight")].transpose(2, 3, 1, 0)
    half = kernel.shape[0] // 2
    x = tf.pad(x, [[0, 0], [half, half], [half, half], [0, 0]])
    groups = x.shape[-1] // kernel.shape[2]
    parts = zip(tf.split(x, groups, axis=-1), np.split(kernel, groups, axis=-1), strict=True)
    x = tf.concat([tf.nn.conv2d(part, k, stride, "VALID") for part, k in parts], axis=-1)
    return x + weights[_key(kind, name, "bias")] if bias else x


def _affine_channels(kind, weights, x, norm):
    if kind == "detectron":
        return x * weights[f"{norm}_s"] + weights[f"{norm}_b"]
    moments = [weights[f"{norm}.{what}"] for what in ("weight", "bias", "running_mean", "running_var")]
    factor, summand = _affine(*moments, EPSILON[kind])
    return x * factor + summand


def _group_norm(weights, x, norm, groups=32, epsilon=1e-5):
    batch, height, width, channels = x.shape
    x = tf.reshape(x, (batch, height, width, groups, channels // groups))
    mean, variance = tf.nn.moments(x, (1, 2, 4), keepdims=True)
    x = tf.reshape((x - mean) / tf.sqrt(variance + epsilon), (batch, height, width, channels))
    return x * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]


def _blocks(kind, weights):
    """Bottlenecks in each of the four stages, as the file has them."""

    def count(stage):
        return sum(_key(kind, _block(kind, stage, i)[0][0], "weight") in weights for i in range(40))

    return [count(stage) for stage in (2, 3, 4, 5)]


def _groups(kind, weights):
    first, second = (weights[_key(kind, conv, "weight")] for conv, _ in _block(kind, 2, 0)[:2])
    return first.shape[0] // second.shape[1]


# Anchors


def permutation(kind):
    """Places in the framework's cell of the nine anchors in the order scale 2^(k/3) outer, ratio h / w .5, 1, 2 inner.

    cell[..., permutation(kind)] puts a cell of the framework into that order.
    """
    if kind == "detectron":  # scale outer, ratio 1, 2, .5 inner
        return [2, 0, 1, 5, 3, 4, 8, 6, 7]
    if kind == "detectron2":
        return list(range(9))
    return [0, 3, 6, 1, 4, 7, 2, 5, 8]  # ratio outer, scale inner


def in_that_order(kind, values):
    """[B, A, V] of the framework with its cells in the order of `permutation`."""
    cells = values.reshape(len(values), -1, 9, values.shape[-1])[:, :, permutation(kind)]
    return cells.reshape(len(values), -1, values.shape[-1])


def anchors(kind, height, width):
    """All anchors of an image of that size, multiples of 32. -> float64 [A, 4]"""
    levels = []
    for stride in STRIDES:
        rows, columns = -(-height // stride), -(-width // stride)
        steps = (stride, stride)
        if kind.startswith("torchvision"):  # the step comes from the grid: more than the stride where a cell is cut off
            steps = (height // rows, width // columns)
        y, x = np.meshgrid(np.arange(rows) * steps[0], np.arange(columns) * steps[1], indexing="ij")
        shifts = np.stack([x, y, x, y], axis=-1)[:, :, None]  # [rows, columns, 1, 4]
        levels.append((shifts + _cell_anchors(kind, stride)).reshape(-1, 4))
    return np.concatenate(levels)


def level_sizes(height, width):
    """Anchors per level."""
    return [-(-height // stride) * -(-width // stride) * 9 for stride in STRIDES]


def _cell_anchors(kind, stride):
    """The nine anchors of the cell in row 0, column 0. -> [9, 4]"""
    if kind == "detectron":
        cell = []
        for k in range(3):
            for ratio in (1.0, 2.0, 0.5):
                width = np.round(np.sqrt(stride * stride / ratio))
                height = np.round(width * ratio)
                scale = 4 * stride * 2 ** (k / 3) / stride
                sides = np.array([width * scale, height * scale])
                center = 0.5 * (stride - 1)
                low, high = center - 0.5 * (sides - 1), center + 0.5 * (sides - 1)  # both pixels inside the box
                cell.append([*low, *(high + 1)])
        return np.array(cell)
    if kind == "detectron2":
        cell = []
        for k in range(3):
            for ratio in (0.5, 1.0, 2.0):
                width = np.sqrt((4 * stride * 2 ** (k / 3)) ** 2 / ratio)
                cell.append([-width / 2, -ratio * width / 2, width / 2, ratio * width / 2])
        return np.array(cell)
    sizes = np.array([int(4 * stride * 2 ** (k / 3)) for k in range(3)], "float32")
    tall = np.sqrt(np.array([0.5, 1.0, 2.0], "float32"))
    heights, widths = (tall[:, None] * sizes).reshape(-1), ((1 / tall)[:, None] * sizes).reshape(-1)
    return np.round(np.stack([-widths, -heights, widths, heights], axis=1) / 2).astype("float64")


# Detections


def detections(kind, logits, deltas, anchors, level_sizes, height, width):
    """What the framework reports of one image: boxes [N, 4], scores [N], labels [N] (the file's classes), best first.

    logits [A, classes], deltas [A, 4] and anchors [A, 4] in the framework's own order; float64 inside.
    """
    logits, deltas, anchors = (np.asarray(x, "float64") for x in (logits, deltas, anchors))
    boxes, scores, labels, start = [], [], [], 0
    for level, size in enumerate(level_sizes):
        probability = 1 / (1 + np.exp(-np.maximum(logits[start : start + size], -500)))
        threshold = 0.0 if kind == "detectron" and level == len(level_sizes) - 1 else 0.05
        rows, classes = np.nonzero(probability > threshold)
        best = np.argsort(-probability[rows, classes], kind="stable")[:1000]
        rows, classes = rows[best], classes[best]
        boxes.append(_decode(anchors[start + rows], deltas[start + rows]))
        scores.append(probability[rows, classes])
        labels.append(classes)
        start += size
    boxes, scores, labels = np.concatenate(boxes), np.concatenate(scores), np.concatenate(labels)
    if kind != "detectron2":
        boxes = _clip(kind, boxes, height, width)
    keep = _nms(boxes, scores, labels, inclusive=kind == "detectron")[: 300 if kind.startswith("torchvision") else 100]
    boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
    if kind == "detectron2":
        boxes = _clip(kind, boxes, height, width)
        real = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        boxes, scores, labels = boxes[real], scores[real], labels[real]
    return boxes, scores, labels


def _decode(anchors, deltas):
    sides = anchors[:, 2:] - anchors[:, :2]
    centers = anchors[:, :2] + sides / 2 + deltas[:, :2] * sides
    sides = sides * np.exp(np.minimum(deltas[:, 2:], np.log(1000 / 16)))
    return np.concatenate([centers - sides / 2, centers + sides / 2], axis=1)


def _clip(kind, boxes, height, width):
    # Detectron's corners are pixels, 0..width - 1, and a box keeps at least one of them.
    one = 1 if kind == "detectron" else 0
    low, high = [0, 0, one, one], [width - one, height - one, width, height]
    return np.clip(boxes, low, high)


def _nms(boxes, scores, labels, inclusive):
    """Indices kept within each class, best first. inclusive: an overlap of exactly 0.5 is dropped too."""
    order = np.argsort(-scores, kind="stable")
    boxes, labels = boxes[order], labels[order]
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    alive = np.ones(len(order), bool)
    for i in range(len(order)):
        if not alive[i]:
            continue
        rivals = np.flatnonzero(alive[i + 1 :] & (labels[i + 1 :] == labels[i])) + i + 1
        sides = np.minimum(boxes[i, 2:], boxes[rivals, 2:]) - np.maximum(boxes[i, :2], boxes[rivals, :2])
        shared = np.prod(np.maximum(sides, 0), axis=1)
        union = area[i] + area[rivals] - shared
        overlap = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
        alive[rivals[overlap >= 0.5 if inclusive else overlap > 0.5]] = False
    return order[alive]
