"""Where a run's replicas are: one device, the devices of this machine, or several machines (§4.1: 8 GPUs)."""

import contextlib
import json
import os

import tensorflow as tf

from retinanet_keras.errors import RunError


def make(config, batch_size=None):
    """The tf.distribute.Strategy of a StrategyConfig. To be called before TensorFlow has used any device.

    Args:
        batch_size: images of a step over all replicas; None: there are no steps, as in evaluation.

    Raises:
        RunError: where there are not enough devices, TF_CONFIG is missing or wrong, or the batch does not divide.
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


def _devices(gpus, count):
    """Names of `count` devices: GPUs, or, where there is none, parts of the CPU."""
    if gpus:
        if count > gpus:
            raise RunError(f"strategy.replicas: {count} are asked for, and this machine has {gpus} GPUs")
        return [f"GPU:{i}" for i in range(count)]
    cpu = tf.config.list_physical_devices("CPU")[0]
    with contextlib.suppress(RuntimeError):  # TensorFlow runs already, with the devices it has
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    there = len(tf.config.list_logical_devices("CPU"))
    if there < count:
        raise RunError(
            f"strategy.replicas: {count} are asked for, and TensorFlow has been started with {there}. Use a new process"
        )
    return [f"CPU:{i}" for i in range(count)]


def _workers():
    """The strategy of several processes, of which TF_CONFIG tells all addresses and which one this is."""
    text = os.environ.get("TF_CONFIG", "")
    try:
        tree = json.loads(text)
        workers, task = tree["cluster"]["worker"], tree["task"]
        known = task["type"] == "worker" and 0 <= task["index"] < len(workers)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        example = '{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, "task": {"type": "worker", "index": 0}}'
        raise RunError(
            f'strategy.kind "workers" expects the environment variable TF_CONFIG in the form of {example}, with this '
            f"process's own index among the workers; got {text or 'none'}"
        )
    return tf.distribute.MultiWorkerMirroredStrategy()


def is_chief(strategy):
    """Whether this process writes the run's folder: the only one, or the first of the workers."""
    cluster = strategy.cluster_resolver
    return cluster is None or not cluster.task_id


def workers(strategy):
    """The number of processes that train together."""
    cluster = strategy.cluster_resolver
    return len(cluster.cluster_spec().as_dict().get("worker", [])) or 1 if cluster else 1


def wait(strategy):
    """Return when all workers have come here.

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
        raise RunError("Another worker has ended; its own output says why. Start all of them again") from None


def check_same(strategy, step):
    """A RunError where the workers are not at the same step."""

    @tf.function
    def sum_of_all():
        return strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("SUM", tf.constant(float(step))))

    if workers(strategy) > 1:
        total = strategy.experimental_local_results(sum_of_all())[0]
        if float(total) != float(step) * strategy.num_replicas_in_sync:
            raise RunError(
                f"This worker goes on from step {step}, others do not. All must see the same folder of the run: share "
                "it, or copy its checkpoints to all machines"
            )


def check_norm(strategy, norm):
    """A RunError where several replicas would train batch normalization."""
    if norm == "batch" and strategy.num_replicas_in_sync > 1:
        raise RunError(
            f'model.norm: expected "group" or "frozen" on {strategy.num_replicas_in_sync} replicas, as each would have '
            'batch statistics of its own; got "batch". Set model.norm=group, or train on one device with '
            "strategy.kind=default"
        )


@contextlib.contextmanager
def chief_first(strategy):
    """What is within is done by the chief, then by the other workers."""
    if not is_chief(strategy):
        wait(strategy)
    yield
    if is_chief(strategy):
        wait(strategy)


def feed(strategy, batches):
    """Training data for `model.fit`, of which each worker prepares only what its own replicas see.

    Args:
        batches: a function of (share, parts) to a tf.data.Dataset, as `training_batches.training_batches` takes them.
    """
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return batches((0, 1), 1)

    def of_worker(context):
        workers = context.num_input_pipelines
        return batches((context.input_pipeline_id, workers), replicas // workers)

    return strategy.distribute_datasets_from_function(of_worker)
