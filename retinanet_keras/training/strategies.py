"""Distribution of a run: one device, the devices of this machine, or several machines (§4.1: 8 GPUs)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator

import tensorflow as tf

from retinanet_keras.config import StrategyConfig
from retinanet_keras.errors import RunError


def make(config: StrategyConfig, batch_size: int | None = None) -> tf.distribute.Strategy:
    """Create the tf.distribute.Strategy of a configuration. To be called before TensorFlow has used any device.

    Args:
        config: StrategyConfig. Kind and number of replicas.
        batch_size: int or None. Images per step over all replicas; None where there are no steps, as in evaluation.

    Raises:
        RunError: where there are too few devices, TF_CONFIG is missing or wrong, or the batch cannot be divided.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if config.kind == "workers":
        strategy = _workers()
    elif config.kind == "mirrored":
        count = config.replicas or len(gpus) or 1
        strategy = tf.distribute.MirroredStrategy(_devices(len(gpus), count))
    elif config.kind == "auto" and len(gpus) > 1:
        strategy = tf.distribute.MirroredStrategy()
    else:
        return tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    if batch_size and batch_size % replicas:
        raise RunError(
            f"train.batch_size: expected a multiple of the number of replicas, {replicas}, got {batch_size}. Choose "
            "another batch size (the learning rate follows it), or another strategy.kind or strategy.replicas"
        )
    return strategy


def _devices(gpus: int, count: int) -> list[str]:
    """Names of `count` devices: GPUs, or, where there is none, logical CPUs."""
    if gpus:
        if count > gpus:
            raise RunError(
                f"strategy.replicas: expected at most {gpus}, the GPUs of this machine, got {count}. Set fewer"
            )
        return [f"GPU:{i}" for i in range(count)]
    cpu = tf.config.list_physical_devices("CPU")[0]
    with contextlib.suppress(RuntimeError):  # TensorFlow has already created its devices
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    available = len(tf.config.list_logical_devices("CPU"))
    if available < count:
        raise RunError(
            f"strategy.replicas: expected at most {available}, the CPU devices that TensorFlow was started with, got "
            f"{count}. Use a new process"
        )
    return [f"CPU:{i}" for i in range(count)]


def _workers() -> tf.distribute.Strategy:
    """The strategy of several processes; TF_CONFIG has the addresses of all and the index of this one."""
    text = os.environ.get("TF_CONFIG", "")
    try:
        tree = json.loads(text)
        workers, task = tree["cluster"]["worker"], tree["task"]
        valid = task["type"] == "worker" and 0 <= task["index"] < len(workers)
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        example = '{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, "task": {"type": "worker", "index": 0}}'
        raise RunError(
            f'strategy.kind "workers" expects the environment variable TF_CONFIG in the form of {example}, with the '
            f"index of this process among the workers; got {text or 'none'}"
        )
    return tf.distribute.MultiWorkerMirroredStrategy()


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes the run's folder: the only one, or the first of the workers."""
    cluster = strategy.cluster_resolver
    return cluster is None or not cluster.task_id


def workers(strategy: tf.distribute.Strategy) -> int:
    """Return the number of processes that train together."""
    cluster = strategy.cluster_resolver
    return len(cluster.cluster_spec().as_dict().get("worker", [])) or 1 if cluster else 1


def wait(strategy: tf.distribute.Strategy) -> None:
    """Wait until all workers have reached this point.

    Raises:
        RunError: where one of them has ended.
    """
    if workers(strategy) == 1:
        return

    @tf.function
    def meet():
        return strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("SUM", tf.ones(())))

    try:
        meet()
    except tf.errors.OpError:
        raise RunError("Another worker has ended; its output says why. Start all of them again") from None


def check_same(strategy: tf.distribute.Strategy, step: int) -> None:
    """Raise a RunError where the workers are not at the same step."""

    @tf.function
    def sum_of_all():
        return strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("SUM", tf.constant(float(step))))

    if workers(strategy) > 1:
        total = strategy.experimental_local_results(sum_of_all())[0]
        if float(total) != float(step) * strategy.num_replicas_in_sync:
            raise RunError(
                f"This worker resumes from step {step}, others do not. All must see the same folder of the run: share "
                "it, or copy its checkpoints to all machines"
            )


def check_norm(strategy: tf.distribute.Strategy, norm: str) -> None:
    """Raise a RunError where several replicas would train batch normalization."""
    if norm == "batch" and strategy.num_replicas_in_sync > 1:
        raise RunError(
            f'model.norm: expected "group" or "frozen" on {strategy.num_replicas_in_sync} replicas, as each would have '
            'separate batch statistics; got "batch". Set model.norm=group, or train on one device with '
            "strategy.kind=default"
        )


@contextlib.contextmanager
def chief_first(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """A context that the chief runs first, then the other workers."""
    if not is_chief(strategy):
        wait(strategy)
    yield
    if is_chief(strategy):
        wait(strategy)


def feed(
    strategy: tf.distribute.Strategy, batches: Callable[[tuple[int, int], int], tf.data.Dataset]
) -> tf.data.Dataset:
    """Return training data for `model.fit`, of which each worker prepares only what its replicas use.

    Args:
        strategy: tf.distribute.Strategy. That of the model.
        batches: function of (share, parts), as of `training_batches.training_batches`, to a tf.data.Dataset.
    """
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return batches((0, 1), 1)

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        workers = context.num_input_pipelines
        return batches((context.input_pipeline_id, workers), replicas // workers)

    return strategy.distribute_datasets_from_function(of_worker)
