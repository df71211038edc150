"""`evaluate.py`: what is to be scored, on which images, and where the results go. All is checked before it begins."""

from pathlib import Path

from retinanet_keras import trained
from retinanet_keras.config import StrategyConfig, load_config
from retinanet_keras.data import sources
from retinanet_keras.data.coco import Categories
from retinanet_keras.results import evaluation
from retinanet_keras.serving import detector
from retinanet_keras.training import evaluator, outputs, strategies
from retinanet_keras.training.checkpoints import load_run
from retinanet_keras.training.folder import RunError, RunFolder, load_config_of
from retinanet_keras.training.unfinished import Unfinished


def evaluate(config, workdir=None, split=None, overrides=(), weights=None, export=None, results=None):
    """Score a run, a file of weights, a SavedModel, or results in COCO's format, on a split.

    Args:
        config: path of the configuration; the run's own is used where there is a run.
        workdir: the run's folder; None: runs/ and the configuration's name.
        split: None: the configuration's `test_split`.
        overrides: as of `load_config`; all visible GPUs are used, or as `strategy` says here.
        weights: a .keras or .weights.h5 file to score in place of the run's.
        export: a SavedModel to score.
        results: a results file to score; needs no model, and takes its categories from the annotations.

    Returns:
        the metrics; None for a split without labels, of which a submission is written.

    Raises:
        UserError: naming what does not fit; nothing has been done then.
    """
    workdir = Path(workdir or Path("runs") / Path(config).stem)
    folder = RunFolder(workdir)
    of_run = not (weights or export or results)
    if of_run and not folder.config_file.exists():
        raise RunError(
            f"There is no run in {workdir}. Train it first: python train.py --config {config} --workdir {workdir}"
        )
    settings = load_config(folder.config_file if folder.config_file.exists() else config, overrides)
    if of_run:
        _check_model(settings, load_config_of(folder))
    split = split or settings.data.test_split or settings.data.val_split
    if results:
        file = sources.annotation_file(settings.data, split)
        return _told(evaluation.coco_metrics(file, results, library=settings.eval.library))

    asked = any(override.startswith("strategy.") for override in overrides)
    strategy = strategies.make(settings.strategy if asked else StrategyConfig())
    dataset = sources.open_split(settings.data, split)
    if of_run and folder.categories_file.exists():
        evaluator.check_categories(dataset, folder.categories())
    detect, categories, names = _detector(strategy, folder, settings, dataset, weights, export)
    evaluator.check_categories(dataset, categories)

    # Only the run's own weights write to the run's own results.
    out = folder.evaluation(split if of_run else f"{split}-{Path(export or weights).name}")
    identity = evaluator.identity(dataset, settings, names)
    unfinished, speed = Unfinished(out / "unfinished.jsonl", identity), {}
    if unfinished.batches:
        print(f"Going on after {sum(map(len, unfinished.batches))} of {len(dataset)} images", flush=True)
    found = detect(dataset, settings, unfinished=unfinished, speed=speed)
    about = {"model": Path(export or weights or workdir).name, "weights": str(export or weights or workdir)}
    records = outputs.collect(found, dataset)
    milliseconds = evaluator.milliseconds(speed)
    metrics = outputs.write(out, records, dataset, settings, split, about, milliseconds)
    unfinished.finish()
    if milliseconds:
        parts = (f"{name} {value:.1f}" for name, value in milliseconds.items() if name in evaluator.PARTS)
        print(f"milliseconds an image: {', '.join(parts)}")
    _told(metrics)
    print(f"\nwritten to {out}" + ("" if metrics else ": the .zip is what COCO's server takes"))
    return metrics


def _check_model(settings, own):
    """A RunError where a configuration asks for another model than the run's own has."""
    differences = [
        f"{section}.{key} is {value!r} in the run, {new!r} is asked for"
        for section in ("model", "anchors")
        for key, value in vars(getattr(own, section)).items()
        if (new := getattr(getattr(settings, section), key)) != value
    ]
    if differences:
        raise RunError(
            f"The run's weights do not fit another model: {'; '.join(differences)}. Leave these settings out"
        )


def _detector(strategy, folder, settings, dataset, weights, export):
    """(a function of (dataset, config, ...) as of `evaluator.detect_split`, Categories, what names the weights)."""
    if export:
        path = trained.saved_model(export)
        search, categories = detector.of_export(path)
        files = sorted(path.glob("variables/*"))
        state = " ".join(
            f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in (path / "saved_model.pb", *files)
        )
        return lambda *args, **kwargs: evaluator.detect_split_by_export(search, *args, **kwargs), categories, state
    with strategy.scope():
        if not weights:
            model = load_run(folder.path, settings)[1]
        elif Path(weights).suffix == ".keras":
            model = trained.of_file(weights, "--weights")
        else:
            model = trained.of_weights(weights, settings, dataset.categories, "--weights")
    arrays = (variable.numpy() for variable in model.weights)
    categories = Categories.from_list(model.categories)
    return lambda *args, **kwargs: evaluator.detect_split(model, *args, **kwargs), categories, arrays


def _told(metrics):
    if metrics:
        print(evaluation.format_metrics(metrics))
    return metrics
