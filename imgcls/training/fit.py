"""A run's request + a packed set + a world -> the run's result. Plain Lightning; knows nothing of Ray.

Called by `cluster.run` in every worker, and by a test in one process. Each rank calls `fit` with its own `World`;
rank 0 writes into the run's folder. Called again after a kill, it goes on from the last committed checkpoint.
"""

import base64
import time
import traceback
import warnings
from contextlib import suppress
from dataclasses import asdict

import lightning.pytorch as pl
import numpy as np
import torch

from imgcls import records, storage
from imgcls.data import order
from imgcls.data.augment import inputs
from imgcls.data.batches import EVALUATION_BATCH, ImageData
from imgcls.data.cache import Cache, open_cache
from imgcls.data.images import encode_png
from imgcls.data.shards import read_manifest, read_pixel_digests
from imgcls.data.splits import check_parts, split_ids
from imgcls.errors import STORAGE_FAILED, CheckpointError, DataError, ImgclsError, LeaseError, NumericsError, StorageError
from imgcls.models.build import build_model, start_from
from imgcls.recipe import differing_fields
from imgcls.records import Example, Keeping, LineageEntry, Manifest, RunConfig, RunResult, Scores
from imgcls.training import environment, weights
from imgcls.training.checkpoints import CheckpointStore
from imgcls.training.lineage import Seen, refuse_seen_images
from imgcls.training.module import Classifier
from imgcls.training.recorder import HISTORY, Progress, Recorder, RunLog, Stopwatch, csv_bytes
from imgcls.training.world import World, lost_a_rank, make_trainer

NUM_EXAMPLES = 8
"""Of right and of wrong predictions each, for the page."""


def fit(
    config: RunConfig,
    *,
    data_url: str,
    run_url: str,
    world: World,
    keeping: Keeping = Keeping(),  # noqa: B008
    accept_different_numerics: bool = False,
) -> RunResult:
    """The run is trained to its end and its result lies in its folder. Every rank returns the same scores.

    Raises DataError, CheckpointError or StorageError; NumericsError where the run would go on with other last bits than
    it was begun with; TrainingError, on every rank, where training itself went wrong. The log then ends with the reason.
    """
    log = RunLog(run_url, writes=world.rank == 0, synthetic=config.synthetic)
    fitting = _Fit(config, data_url, run_url, world, log, keeping, accept_different_numerics)
    try:
        with environment.threads(1 if config.recipe.numerics == "elastic" else None):
            return fitting.run()
    except StorageError as error:
        with suppress(StorageError), storage.within(storage.PREFLIGHT_S):  # it may be what does not answer
            world.crashed(f"{STORAGE_FAILED}{error}", fitting.step, "")
        raise
    except LeaseError:
        raise  # the log is another's now
    except ImgclsError as error:
        log.line(str(error))
        raise
    except Exception as error:
        if lost_a_rank(error):
            log.line(f"another worker of this run has gone, or hangs, at step {fitting.step}: {error}")
            raise
        place, trace = traceback.extract_tb(error.__traceback__)[-1], traceback.format_exc()
        world.crashed(f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})", fitting.step, trace)
        log.line(trace)
        raise


class _Fit:
    """The parts of one call of `fit`, in the order in which they are made."""

    def __init__(
        self,
        config: RunConfig,
        data_url: str,
        run_url: str,
        world: World,
        log: RunLog,
        keeping: Keeping,
        accept_different_numerics: bool,
    ) -> None:
        self.config, self.recipe, self.run_url, self.world, self.log = config, config.recipe, run_url, world, log
        self.keeping, self.accept_different_numerics = keeping, accept_different_numerics
        self.set_url = storage.join(data_url, self.recipe.dataset)
        self.store = CheckpointStore(storage.join(run_url, "checkpoints"), say=log.line)
        self.trainer: pl.Trainer | None = None
        self.traffic_at_start = asdict(storage.traffic)
        self.clock, self.start_s = Stopwatch(), max(0.0, time.time() - world.started_s)

    def run(self) -> RunResult:
        self.manifest = self._manifest()
        self.cache = self._cache()
        self.splits = split_ids(self.recipe, self.manifest)
        check_parts(self.recipe, len(self.splits.train), world_size=self.world.size)
        if self.world.rank == 0:
            self.store.clean()
        self.numerics = environment.numerics_of_all(
            self.recipe, world_size=self.world.size, accelerator=self.world.accelerator
        )
        self.module, self.lineage = self._module()
        self.data = self._data()
        self.recorder = self._recorder()
        self._train()
        result = self._finish()
        if self.world.rank == 0:
            records.write(result, storage.join(self.run_url, "result.json"))
        return result

    @property
    def step(self) -> int:
        """The one under way."""
        return self.trainer.global_step if self.trainer else 0

    def _manifest(self) -> Manifest:
        manifest = read_manifest(self.set_url)
        if manifest.digest != self.config.data_digest:
            raise DataError(
                f"{self.set_url} has digest {manifest.digest[:12]}, {self.config.name} was asked for with "
                f"{self.config.data_digest[:12]}: it was packed again\n  do: take another --id, or bring the old set back"
            )
        return manifest

    def _cache(self) -> Cache:
        self.world.report(Progress(phase="cache"))
        with self.clock.of("cache"):
            cache = open_cache(
                self.set_url,
                self.manifest,
                px=self.recipe.input.stored_px,
                channels=self.recipe.input.channels,
                asked_by=self.world.asked_by,
                say=self.log.line,
            )
        # Reports wait for all ranks without a deadline: no rank meets a collective's while another node still decodes.
        self.world.report(Progress(phase="start"))
        return cache

    def _recorder(self) -> Recorder:
        return Recorder(
            self.run_url,
            self.store,
            keeping=self.keeping,
            run_digest=self.config.digest(),
            numerics=self.numerics,
            about=weights.about(self.recipe, self.manifest.class_names, self.lineage, synthetic=self.config.synthetic),
            planned_batches=self.data.planned_batches,
            epochs=self.recipe.length.epochs,
            patience=self.recipe.length.patience,
            world=self.world,
            log=self.log,
            clock=self.clock,
            traffic_at_start=self.traffic_at_start,
        )

    def _module(self) -> tuple[Classifier, tuple[Seen, ...]]:
        network = build_model(self.recipe, num_classes=len(self.manifest.class_names), seed=self.config.seed)
        pixels = read_pixel_digests(self.set_url, self.manifest)
        ancestors: tuple[Seen, ...] = ()
        if self.config.init is not None:
            found = source_model(self.config, self.run_url)
            refuse_seen_images(found.model.lineage, source=found.url, dataset=self.recipe.dataset, pixels=pixels)
            start_from(network, found.model.weights, source=found.url)
            ancestors = found.model.lineage
        entry = LineageEntry(dataset=self.recipe.dataset, digest=self.manifest.digest, run=self.config.name)
        steps = order.num_steps(
            len(self.splits.train), size=self.recipe.global_batch_size, keep_last=self.recipe.last_batch == "keep"
        )
        module = Classifier(
            network,
            self.recipe,
            num_classes=len(self.manifest.class_names),
            total_steps=steps * self.recipe.length.epochs,
            seed=self.config.seed,
            world=self.world,
        )
        return module, (*ancestors, Seen(entry, np.sort(pixels)))

    def _train(self) -> None:
        self.trainer = make_trainer(
            self.world,
            precision=self.recipe.precision,
            plugins=[self.store],
            callbacks=[self.recorder],
            max_epochs=self.recipe.length.epochs,
        )
        last = self.world.agree(self.store.newest_whole() if self.world.rank == 0 else None)
        if last is None:
            self.clock.add("start", self.start_s)
            self.log.line(f"{self.config.name}: {self._plan()}")
        else:
            self._check_resume(last)
            self.recorder.gone_on_from = last.step
            self.log.line(f"{self.config.name}: goes on after epoch {last.epoch}, step {last.step}")
        if last is not None and last.finished:
            state = self.store.load_checkpoint(self.store.place(last.step))
            self.module.network.load_state_dict(weights.network_weights(state))
            self.recorder.load_state_dict(state["callbacks"][self.recorder.state_key])
            return
        with warnings.catch_warnings():
            # It advises DataLoader worker processes; ours is one gather a batch.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            resume = self.store.place(last.step) if last else None
            self.trainer.fit(self.module, datamodule=self.data, ckpt_path=resume, weights_only=True)
        self.store.wait()
        self.world.agree(None)  # no rank reads what is not committed yet

    def _check_resume(self, last: weights.Committed) -> None:
        """Of the same request; under the same numerics, unless that does not matter any more or was accepted."""
        if last.run_digest != self.config.digest():
            raise CheckpointError(
                f"{self.store.url} holds checkpoints of another request ({last.run_digest[:12]}, not "
                f"{self.config.digest()[:12]})\n  do: take another --id"
            )
        changes = [] if last.finished else self.world.agree(differing_fields(last.numerics, self.numerics))
        if changes and not self.accept_different_numerics:
            raise NumericsError(
                f"{self.config.name} stopped at step {last.step} under other numerics: {'; '.join(changes)} (then / now)\n"
                "  do: go on as it was begun, or with --accept-different-numerics; its last bits will be others"
            )
        for change in changes:
            self.log.line(f"goes on under other numerics, as was accepted: {change} (then / now)")
        self.recorder.numerics_changes += changes

    def _data(self) -> ImageData:
        seed, world, wait = self.config.seed, self.world, self.world.heartbeat.waiting
        return ImageData(
            self.recipe, self.cache, self.splits, seed=seed, rank=world.rank, world_size=world.size, waiting=wait
        )

    def _plan(self) -> str:
        s = self.splits
        return (
            f"{len(s.train)} training, {len(s.val)} validation, {len(s.test)} test samples of {self.manifest.name}, "
            f"{len(self.data.train_dataloader())} steps an epoch, {self.world.size} workers"
        )

    def _finish(self) -> RunResult:
        assert self.trainer is not None
        last_sha256 = weights.weights_sha256(self.module.network.state_dict())
        best = self.recorder.best_row
        best_place = self.store.place(int(best["step"]))
        best_state = self.store.load_checkpoint(best_place)
        self.module.network.load_state_dict(weights.network_weights(best_state))
        self.world.report(Progress(phase="test", epoch=len(self.recorder.history), epochs=self.recipe.length.epochs))
        with self.clock.of("test"):
            self.trainer.test(self.module, datamodule=self.data, verbose=False)
        test, model_url = self.module.scores["test"], storage.join(self.run_url, "model.pt")
        check_counted(test, len(self.splits.test))
        model = weights.Model(
            recipe=self.recipe,
            class_names=self.manifest.class_names,
            weights=self.module.network.state_dict(),
            lineage=self.lineage,
            synthetic=self.config.synthetic,
        )
        # Before rank 0 is alone with storage: others would wait for it in a collective.
        others = self._traffic_of_others()
        model_sha256 = weights.save_model(model, model_url) if self.world.rank == 0 else None
        self.log.line(f"tested once, on the best checkpoint (epoch {best['epoch']}): accuracy {test.accuracy:.4f}")
        trained, seconds = sum(float(row["samples"]) for row in self.recorder.history), self.clock.seconds
        return RunResult.of(
            self.config,
            status="finished",
            class_names=self.manifest.class_names,
            epochs=len(self.recorder.history),
            steps=int(self.recorder.history[-1]["step"]),
            best_epoch=int(best["epoch"]),
            num_train=len(self.splits.train),
            val=self.recorder.best,
            test=test,
            examples=self._examples() if self.world.rank == 0 else (),
            seconds={phase: round(value, 3) for phase, value in seconds.items()},
            images_per_s=round(trained / seconds["train"], 1),
            storage={name: round(value + others[name], 3) for name, value in self.recorder.traffic.items()},
            numerics_changes=tuple(self.recorder.numerics_changes),
            checkpoint=f"checkpoints/{storage.name_of(best_place)}",
            weights_sha256=last_sha256,
            best_weights_sha256=model.weights_sha256,
            model_sha256=model_sha256,
            history_sha256=storage.sha256(csv_bytes(HISTORY, self.recorder.history)),
            num_parameters=sum(p.numel() for p in self.module.network.parameters()),
            lineage=tuple(seen.entry for seen in self.lineage),
            placement=self.world.placement,
            versions=environment.versions(),
            hardware=environment.hardware(),
            commit=environment.commit(),
        )

    def _traffic_of_others(self) -> dict[str, float]:
        """Of the other ranks together."""
        assert self.trainer is not None
        mine = self.recorder.traffic
        values = torch.tensor(list(mine.values()), dtype=torch.float64, device=self.trainer.strategy.root_device)
        summed = self.trainer.strategy.reduce(values.clone(), reduce_op="sum").tolist()
        return {name: total - value for (name, value), total in zip(mine.items(), summed, strict=True)}

    @torch.no_grad()
    def _examples(self) -> tuple[Example, ...]:
        """Right and wrong predictions among one fixed batch of test samples, whatever the number of workers."""
        ids = self.splits.test
        some = np.sort(ids[order.permutation(0, 0, len(ids))[:EVALUATION_BATCH]])
        device = next(self.module.network.parameters()).device
        images = torch.from_numpy(self.cache.images[some]).to(device)
        probabilities = self.module.network.eval()(inputs(images, self.recipe.input)).float().softmax(1).cpu()
        found = []
        for row, label in zip(range(len(some)), self.cache.labels[some], strict=True):
            top = int(probabilities[row].argmax())
            example = Example(
                label=int(label),
                prediction=top,
                probability=float(probabilities[row, top]),
                png_base64=base64.b64encode(encode_png(self.cache.images[some[row]])).decode(),
            )
            found.append(example)
        right = [one for one in found if one.label == one.prediction][:NUM_EXAMPLES]
        wrong = [one for one in found if one.label != one.prediction][:NUM_EXAMPLES]
        return (*right, *wrong)


def source_model(config: RunConfig, run_url: str) -> weights.FoundModel:
    """The weights that this run starts from. Raises CheckpointError where they are not those that were named."""
    assert config.init is not None
    if config.source_run is not None:
        return weights.find_model(storage.join(run_url.rstrip("/").rpartition("/")[0], config.source_run))
    found = weights.find_model(config.init.run)
    if found.model.weights_sha256 != config.init.identity:
        raise CheckpointError(
            f"{found.url} has other weights than when {config.name} was asked for\n"
            "  do: bring them back, or take another --id"
        )
    return found


def check_counted(scores: Scores, expected: int) -> None:
    assert scores.num_samples == expected, f"{scores.num_samples} samples were counted, the split has {expected}"
