"""A run's request + a packed set + a world -> the run's result. Plain Lightning; knows nothing of Ray.

Called by `cluster.carry.run` in every worker, and by a test in one process. Each rank calls `fit` with its own `World`;
rank 0 writes into the run's folder. Called again after a kill, it goes on from the last committed checkpoint.
"""

import base64
import time
import traceback
from contextlib import suppress
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np

from imgcls import storage
from imgcls.data import order
from imgcls.data.batches import ImageData
from imgcls.data.cache import open_cache
from imgcls.data.images import encode_png
from imgcls.data.shards import read_manifest, read_pixel_digests
from imgcls.data.splits import check_parts, split_ids
from imgcls.errors import STORAGE_FAILED, CheckpointError, DataError, ImgclsError, LeaseError, NumericsError, StorageError
from imgcls.models.build import build_model, start_from
from imgcls.recipe import differing_fields
from imgcls.records import LineageEntry, PredictedSample, RunConfig, RunOptions, RunResult, Scores
from imgcls.runs import Committed, RunFolder
from imgcls.training import environment, weights
from imgcls.training.checkpoints import CheckpointStore
from imgcls.training.files import RunFiles, RunLog, Stopwatch, TrafficMeter
from imgcls.training.history import History
from imgcls.training.lineage import Seen, refuse_seen_images
from imgcls.training.module import Classifier
from imgcls.training.progress import Progress
from imgcls.training.recorder import Commits, Recorder
from imgcls.training.totals import as_npy
from imgcls.training.world import World, lost_a_rank, make_trainer

NUM_EXAMPLES = 8
"""Of right and of wrong predictions each, for the page."""


def fit(
    config: RunConfig, *, data_url: str, run_url: str, world: World, options: RunOptions = RunOptions(), tested: bool = True
) -> RunResult:
    """The run is trained to its end and its result lies in its folder. Every rank returns the same scores.

    tested: else nothing looks at the test set; so it is with trials of a search.

    Raises DataError, CheckpointError or StorageError; NumericsError where the run would go on with other last bits than
    it was begun with; TrainingError, on every rank, where training itself went wrong. The log then ends with the reason.
    """
    run, heartbeat = RunFolder(run_url), world.heartbeat
    log = RunLog(run, writes=world.rank == 0, synthetic=config.synthetic)
    try:
        with environment.threads(1 if config.recipe.numerics == "elastic" else None):
            return _fit(config, storage.join(data_url, config.recipe.dataset), run, world, log, options, tested)
    except StorageError as error:
        with suppress(StorageError), storage.within(storage.PREFLIGHT_S):  # it may be what does not answer
            world.crashed(f"{STORAGE_FAILED}{error}", heartbeat.step, "")
        raise
    except LeaseError:
        raise  # the log is another's now
    except ImgclsError as error:
        log.line(str(error))
        raise
    except Exception as error:
        if lost_a_rank(error):
            log.line(f"another worker of this run has gone, or hangs, at step {heartbeat.step}: {error}")
            raise
        place, trace = traceback.extract_tb(error.__traceback__)[-1], traceback.format_exc()
        world.crashed(f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})", heartbeat.step, trace)
        log.line(trace)
        raise


def _fit(
    config: RunConfig, set_url: str, run: RunFolder, world: World, log: RunLog, options: RunOptions, tested: bool
) -> RunResult:
    traffic, clock, start_s = TrafficMeter(), Stopwatch(), max(0.0, time.time() - world.started_s)
    recipe = config.recipe
    store = CheckpointStore(run.checkpoints_url, say=log.line)
    model, data, module = _prepare(config, set_url, run, world, log, clock)
    if world.rank == 0:
        store.clean()
    mine = environment.numerics(recipe, world_size=world.size, accelerator=world.accelerator)
    numerics = environment.numerics_of_all(world.gather(mine))
    history, files = History(recipe.length.epochs, recipe.length.patience), RunFiles(run, writes=world.rank == 0)
    commits = Commits(store, options, config.digest(), numerics, failures=world.attempt - 1)
    recorder = Recorder(
        history, commits, files, model=model, data=data, module=module, run_log=log, clock=clock, traffic=traffic
    )
    trainer = make_trainer(
        world, precision=recipe.precision, plugins=[store], callbacks=[recorder], max_epochs=recipe.length.epochs
    )
    last = world.broadcast(store.newest_whole() if world.rank == 0 else None)
    if last is None:
        clock.add("start", start_s)
        splits, steps = data.splits, len(data.train_dataloader())
        log.line(
            f"{config.name}: {len(splits.train)} training, {len(splits.val)} validation, {len(splits.test)} test samples of "
            f"{recipe.dataset}, {steps} steps an epoch, {world.size} workers"
        )
    else:
        _go_on(config, last, recorder)
    trainer.fit(module, datamodule=data, ckpt_path=store.place(last.step) if last else None, weights_only=True)
    store.wait()
    world.broadcast(None)  # no rank reads what is not committed yet
    result = _finish(config, run, trainer, recorder, tested=tested)
    if world.rank == 0:
        run.finish(result)
    return result


def _prepare(
    config: RunConfig, set_url: str, run: RunFolder, world: World, log: RunLog, clock: Stopwatch
) -> tuple[weights.Model, ImageData, Classifier]:
    """What the run will leave, still without weights; what it trains on, and what it trains."""
    recipe, manifest = config.recipe, read_manifest(set_url)
    if manifest.digest != config.data_digest:
        raise DataError(
            f"{set_url} has digest {manifest.digest[:12]}, {config.name} was asked for with {config.data_digest[:12]}: "
            "it was packed again\n  do: take another --id, or bring the old set back"
        )
    world.report(Progress(phase="cache"))
    with clock.of("cache"):
        px, channels = recipe.input.stored_px, recipe.input.channels
        cache = open_cache(set_url, manifest, px=px, channels=channels, command=world.command, say=log.line)
    splits = split_ids(recipe, manifest)
    check_parts(recipe, len(splits.train), world_size=world.size)
    data = ImageData(recipe, cache, splits, seed=config.seed, rank=world.rank, world_size=world.size)
    network = build_model(recipe, num_classes=len(manifest.class_names), seed=config.seed)
    pixels = read_pixel_digests(set_url, manifest)
    ancestors: tuple[Seen, ...] = ()
    if config.init is not None:
        source = weights.source_model(config, run)
        refuse_seen_images(source.lineage, source=source.url, dataset=recipe.dataset, pixels=pixels)
        start_from(network, source.weights, source=source.url)
        ancestors = source.lineage
    own = Seen(LineageEntry(dataset=recipe.dataset, digest=manifest.digest, run=config.name), np.sort(pixels))
    steps = order.num_steps(len(splits.train), size=recipe.global_batch_size, keep_last=recipe.last_batch == "keep")
    num_classes, total_steps = len(manifest.class_names), steps * recipe.length.epochs
    module = Classifier(network, recipe, num_classes=num_classes, total_steps=total_steps, seed=config.seed, world=world)
    # Reports wait for all ranks without a deadline: no rank meets a collective's while another one still prepares.
    world.report(Progress(phase="start"))
    model = weights.Model(run.model_url, recipe, manifest.class_names, {}, (*ancestors, own), config.synthetic)
    return model, data, module


def _go_on(config: RunConfig, last: Committed, recorder: Recorder) -> None:
    """The recorder knows from where. The checkpoint is of the same request, and of the same numerics where they matter."""
    commits, log, world = recorder.commits, recorder.run_log, recorder.module.world
    if last.run_digest != config.digest():
        raise CheckpointError(
            f"{commits.store.url} holds checkpoints of another request ({last.run_digest[:12]}, not "
            f"{config.digest()[:12]})\n  do: take another --id"
        )
    changes = [] if last.finished else world.broadcast(differing_fields(last.numerics, commits.numerics))
    if changes and not commits.options.accept_different_numerics:
        raise NumericsError(
            f"{config.name} stopped at step {last.step} under other numerics: {'; '.join(changes)} (then / now)\n"
            "  do: go on as it was begun, or with --accept-different-numerics; its last bits will be others"
        )
    for change in changes:
        log.line(f"goes on under other numerics, as was accepted: {change} (then / now)")
    recorder.numerics_changes += changes
    commits.gone_on_from = last.step
    log.line(f"{config.name}: goes on after epoch {last.epoch}, step {last.step}")


def _finish(config: RunConfig, run: RunFolder, trainer: pl.Trainer, recorder: Recorder, *, tested: bool) -> RunResult:
    """The best checkpoint becomes the run's model, and is tested, once."""
    history, module, world, clock = recorder.history, recorder.module, recorder.module.world, recorder.clock
    last_sha256, store = weights.weights_sha256(module.network.state_dict()), recorder.commits.store
    best = store.place(int(history.best_row["step"]))
    module.evaluated.load_state_dict(weights.network_weights(store.load_checkpoint(best)))
    predictions = _test(trainer, recorder) if tested else None
    model = replace(recorder.model, weights=module.evaluated.state_dict())
    # Before rank 0 is alone with storage: others would wait for it in a collective.
    traffic = world.gather(recorder.traffic.amounts)
    if world.rank == 0 and predictions:
        storage.write_bytes(run.predictions_url, predictions)
    model_sha256 = weights.save_model(model) if world.rank == 0 else None
    traffic[world.rank] = recorder.traffic.amounts
    seconds = clock.seconds
    return RunResult.of(
        config,
        status="finished",
        class_names=model.class_names,
        epochs=len(history.rows),
        steps=int(history.rows[-1]["step"]),
        best_epoch=int(history.best_row["epoch"]),
        num_train=len(recorder.data.splits.train),
        val=history.best,
        test=module.scores["test"] if tested else None,
        examples=_examples(recorder) if tested and world.rank == 0 else (),
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        images_per_s=round(sum(int(row["samples"]) for row in history.rows) / seconds["train"], 1),
        storage={name: round(sum(amounts[name] for amounts in traffic), 3) for name in traffic[0]},
        numerics_changes=tuple(recorder.numerics_changes),
        checkpoint=best.removeprefix(f"{run.url.rstrip('/')}/"),
        weights_sha256=last_sha256,
        best_weights_sha256=model.weights_sha256,
        model_sha256=model_sha256,
        predictions_sha256=storage.sha256(predictions) if predictions else None,
        history_sha256=storage.sha256(history.as_csv()),
        num_parameters=sum(p.numel() for p in module.network.parameters()),
        lineage=tuple(seen.entry for seen in model.lineage),
        placement=world.placement,
        **environment.origin(),
    )


def _test(trainer: pl.Trainer, recorder: Recorder) -> bytes:
    """The best checkpoint on the test set. Returns what was predicted, as a file."""
    history, module, data = recorder.history, recorder.module, recorder.data
    module.world.report(Progress(phase="test", epoch=len(history.rows), epochs=history.epochs))
    with recorder.clock.of("test"):
        trainer.test(module, datamodule=data, verbose=False)
    test, epoch = module.scores["test"], history.best_row["epoch"]
    check_counted(test, len(data.splits.test))
    recorder.run_log.line(f"tested once, on the best checkpoint (epoch {epoch}): accuracy {test.accuracy:.4f}")
    return as_npy(module.predicted)


def _examples(recorder: Recorder) -> tuple[PredictedSample, ...]:
    """Some right predictions, drawn once for all runs, and the most confident mistakes."""
    table, images = recorder.module.predicted, recorder.data.cache.images
    drawn = table[order.permutation(0, 0, len(table))]
    mistakes = table[np.argsort(-table["probability"], kind="stable")]
    right, wrong = drawn[drawn["label"] == drawn["prediction"]], mistakes[mistakes["label"] != mistakes["prediction"]]
    return tuple(
        PredictedSample(
            label=int(row["label"]),
            prediction=int(row["prediction"]),
            probability=float(row["probability"]),
            png_base64=base64.b64encode(encode_png(images[row["sample"]])).decode(),
        )
        for row in (*right[:NUM_EXAMPLES], *wrong[:NUM_EXAMPLES])
    )


def check_counted(scores: Scores, expected: int) -> None:
    assert scores.num_samples == expected, f"{scores.num_samples} samples were counted, the split has {expected}"
