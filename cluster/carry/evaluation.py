"""A checkpoint on a split: here in this process for one worker, under Ray Train for more. The same scores either way."""

import secrets
from functools import partial
from typing import Any

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
    from imgcls.training.weights import find_model

    silence_libraries(verbose)
    source = find_model(checkpoint)  # Lightning, whose import takes seconds, is not needed to miss it
    from imgcls.training.environment import threads
    from imgcls.training.evaluate import evaluate, manifest_for
    from imgcls.training.world import World

    manifest = manifest_for(source, data_url=data_url, split=split)  # what does not fit is said before Ray starts
    if num_workers == 1 and not session.names_cluster():
        with threads(1):  # as a worker has: on some CPUs the last bits depend on their number
            scores = evaluate(source, data_url=data_url, split=split, world=World(accelerator="auto"))
    else:
        options = RunOptions(num_workers=num_workers, verbose=verbose, hang_timeout_s=1800)
        scores = _under_ray(checkpoint, data_url, split, options)
    return Evaluation(
        checkpoint=source.url,
        weights_sha256=source.weights_sha256,
        dataset=source.recipe.dataset,
        data_digest=manifest.digest,
        trained_on=source.data_digest,
        split=split,
        synthetic=source.synthetic,
        class_names=source.class_names,
        scores=scores,
    )


def _under_ray(checkpoint: str, data_url: str, split: Split, options: RunOptions) -> Any:
    """The scores, which all workers of a placement return."""
    if not session.names_cluster():
        placements.choose([placements.local_node()], options)
    with session.session(verbose=options.verbose), storage.temporary_folder("train") as folder:
        from ray.train import TrainingFailedError

        from cluster.carry.trainer import LeanTrainer

        check_seen_by_nodes([checkpoint, data_url])
        placement = placements.choose(placements.cluster_nodes(placements.autoscaling_config()), options)
        work = partial(_work, checkpoint, data_url, split, options.verbose, placement, secrets.token_hex(8))
        try:
            return LeanTrainer(work, placement, options, name="evaluate", storage_path=folder).fit().return_value
        except TrainingFailedError as error:
            raise cause_of(error)[1] from None


def _work(checkpoint: str, data_url: str, split: Split, verbose: bool, placement: Placement, command: str) -> Scores:
    """Of one worker. The workers of a command check a node's cache once."""
    silence_libraries(verbose)
    from imgcls.training.evaluate import evaluate
    from imgcls.training.weights import find_model

    world = world_of(placement, command=command)
    return evaluate(find_model(checkpoint), data_url=data_url, split=split, world=world)
