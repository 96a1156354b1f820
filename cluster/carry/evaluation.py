"""A checkpoint on a split: here in this process for one worker, under Ray Train for more. The same scores either way."""

import secrets
from collections.abc import Callable
from functools import partial
from typing import cast

from cluster import placement as placements
from cluster import session
from cluster.carry.run import cause_of, silence_libraries, world_of
from cluster.look.preflight import check_seen_by_nodes
from imgcls import storage
from imgcls.records import Placement, Record, RunOptions, Scores, Split


class Evaluation(Record):
    """What a checkpoint scored."""

    checkpoint: str
    weights_sha256: str
    dataset: str
    data_digest: str
    trained_on: str
    """Digest of the data that the weights were trained on."""
    split: Split
    synthetic: bool
    class_names: tuple[str, ...]
    scores: Scores


def evaluate_checkpoint(checkpoint: str, *, data_url: str, split: Split, num_workers: int, verbose: bool) -> Evaluation:
    """Raises CheckpointError, DataError, and PlacementError where the workers can never run."""
    work = partial(_evaluate, checkpoint, data_url=data_url, split=split, verbose=verbose)
    if num_workers == 1 and not session.names_cluster():
        return work()
    from imgcls.training.weights import find_model

    # What is wrong with them is said before Ray starts.
    source = find_model(checkpoint)
    from imgcls.training.evaluate import manifest_for

    manifest_for(source, data_url=data_url, split=split)
    options = RunOptions(num_workers=num_workers)
    if not session.names_cluster():
        placements.choose([placements.local_node()], options)
    with session.session(verbose=verbose):
        check_seen_by_nodes([checkpoint, data_url])
        nodes = placements.cluster_nodes(placements.autoscaling_config())
        placement = placements.choose(nodes, options)
        return _under_ray(partial(work, placement=placement, command=secrets.token_hex(8)), placement, verbose=verbose)


def _under_ray(work: Callable[[], Evaluation], placement: Placement, *, verbose: bool) -> Evaluation:
    from ray.train import TrainingFailedError

    from cluster.carry.trainer import LeanTrainer

    with storage.temporary_folder("train") as folder:
        try:
            result = LeanTrainer(work, placement, verbose=verbose, name="evaluate", storage_path=folder).fit()
        except TrainingFailedError as error:
            raise cause_of(error)[1] from None
    return cast(Evaluation, result.return_value)


def _evaluate(
    checkpoint: str,
    *,
    data_url: str,
    split: Split,
    verbose: bool,
    placement: Placement | None = None,
    command: str | None = None,
) -> Evaluation:
    """placement, command: of a worker under Ray. The workers of a command check a node's cache once."""
    from imgcls.training.weights import find_model

    silence_libraries(verbose)
    source = find_model(checkpoint)  # Lightning, whose import takes seconds, is not needed to miss it
    from imgcls.training.environment import threads
    from imgcls.training.evaluate import evaluate, manifest_for
    from imgcls.training.world import World

    manifest = manifest_for(source, data_url=data_url, split=split)
    world = world_of(placement, command=command) if placement else World(accelerator="auto")
    with threads(None if placement else 1):  # as a worker has: on some CPUs the last bits depend on their number
        scores = evaluate(source, data_url=data_url, split=split, world=world)
    return Evaluation(
        checkpoint=source.url,
        weights_sha256=source.model.weights_sha256,
        dataset=source.model.recipe.dataset,
        data_digest=manifest.digest,
        trained_on=source.model.data_digest,
        split=split,
        synthetic=source.model.synthetic,
        class_names=source.model.class_names,
        scores=scores,
    )
