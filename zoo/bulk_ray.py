"""Bulk work on Ray Data: a model per actor, on one machine or on a cluster. Install with `vlbridge[ray]`.

Actors take ranges of pictures, read them from the shared file system, and write the ranges' files themselves, so that
a kill loses no more than the ranges that are in work. The job is that of `vlbridge.bulk`: either may go on with the
other's.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator

from .bulk import Done, Job, run
from .inference import BATCH_SIZE, load


logger = logging.getLogger(__name__)

_MOST_RANGES_PER_CALL = 8  # the next range is read while the last one is answered, but not across calls


class Actor:
    """A model, loaded once, that answers about one group of ranges after the other.

    Args:
        job: The job.
        device: Where to put the model; `None` takes the GPU that Ray has given to this actor, else the CPU.
        batch_size: Number of pictures per batch.
        workers: Threads that prepare pictures.
    """

    def __init__(self, job: Job, device: str | None, batch_size: int, workers: int | None):
        self.job, self.batch_size, self.workers = job, batch_size, workers
        self.model, self.processor = load(job.question.model, device, job.question.dtype)

    def __call__(self, batch: dict) -> Iterator[dict]:
        """Answer about the pictures of some ranges, and write their files.

        Args:
            batch: Numbers of ranges, as `range`.

        Yields:
            Each range, when its file is there: `range`, `pictures`, `failed`.
        """
        left = self.job.files.done()  # Ray repeats what a lost actor had begun
        numbers = [int(number) for number in batch["range"] if int(number) not in left]
        for done in run(
            self.job, numbers, self.model, self.processor, batch_size=self.batch_size, workers=self.workers
        ):
            yield {"range": [done.number], "pictures": [done.pictures], "failed": [done.failed]}


def run_on_ray(
    job: Job,
    actors: int,
    *,
    device: str | None = None,
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
    gpus_per_actor: float | None = None,
) -> Iterator[Done]:
    """Do what is left of a job with Ray Data: on the cluster of `RAY_ADDRESS`, else on this machine.

    Paths of the inputs, of the output and of a model in a folder must lead to the same files on all machines.

    Args:
        job: The job, from `vlbridge.bulk.plan`.
        actors: Number of actors; each loads the model.
        device: Where actors put it; `None` takes the GPU that Ray has given to the actor, else the CPU.
        batch_size: Number of pictures per batch.
        workers: Threads per actor that prepare pictures; `None` takes one per CPU core, at most 8.
        gpus_per_actor: GPUs, or a part of one, that an actor has; `None`: one where the cluster has any.

    Yields:
        Each range, when its file is there; those that were there before are left out.

    Raises:
        ImportError: Ray is not installed.
        RuntimeError: Ray does not start, or an actor has failed; what was written stays.
    """
    require_ray()
    return _run(job, actors, device, batch_size, workers, gpus_per_actor)


def require_ray() -> None:
    """Refuse to go on without Ray.

    Raises:
        ImportError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ImportError('Ray is not installed: pip install "vlbridge[ray]"') from error


def _run(job: Job, actors: int, device: str | None, batch_size: int, workers: int | None, gpus: float | None):
    import ray

    todo = job.todo()
    if not todo:
        return
    begun = not ray.is_initialized()
    if begun:
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        except Exception as error:  # Ray raises this class itself when its services don't answer in time
            raise RuntimeError(f"Ray does not start: {error}") from error
    try:
        there = ray.cluster_resources()
        if gpus is None:
            gpus = 1 if there.get("GPU", 0) and device != "cpu" else 0
        kind, each = ("GPU", gpus) if gpus else ("CPU", 1)
        if actors * each > there.get(kind, 0):
            logger.warning(
                f"{actors} actors want {actors * each:g} {kind}s and the cluster has {there.get(kind, 0):g} now; the "
                "others wait until it grows."
            )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        at_once = max(1, min(_MOST_RANGES_PER_CALL, len(todo) // (4 * actors)))
        ranges = ray.data.from_items(
            [{"range": number} for number, _ in todo], override_num_blocks=math.ceil(len(todo) / at_once)
        )
        done = ranges.map_batches(
            Actor,
            fn_constructor_args=(job, device, batch_size, workers),
            batch_size=None,  # a block per call
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_gpus=gpus or None,
            num_cpus=None if gpus else 1,
        )
        for row in done.iter_rows():
            yield Done(int(row["range"]), int(row["pictures"]), int(row["failed"]))
    except ray.exceptions.RayError as error:
        cause = error.__cause__ or error
        raise RuntimeError(f"an actor has failed: {type(cause).__name__}: {cause}") from error
    finally:
        if begun:
            ray.shutdown()


__all__ = ["Actor", "require_ray", "run_on_ray"]
