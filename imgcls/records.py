"""What is written as JSON and read back at the door: manifest, run configuration, run result, suite.

Strict and closed: a field that is missing, unknown or of another type is an error that names it. Written by
`data.shards`, `training.fit` and `cluster.carry.suite`; read by whoever needs a fact that another process found.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from imgcls import storage
from imgcls.errors import DamagedError, DataError, RecipeError
from imgcls.recipe import Amount, Count, Recipe, Strict, digest_of
from imgcls.search import Search

Split = Literal["train", "val", "test"]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Self:
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(
                f"{where} is not a {cls.__name__} of this version: {place}: {first['msg']} ({error.error_count()} in all)"
            ) from None

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()


R = TypeVar("R", bound=Record)


@storage.fetched_again(DataError)
def read(kind: type[R], url: str) -> R:
    """What `write` put there. Raises DataError where a byte of it is another, in two copies that were fetched."""
    return _opened(kind, storage.read_bytes(url), url)


@storage.fetched_again(DataError)
def read_if_there(kind: type[R], url: str) -> R | None:
    data = storage.read_bytes_if_there(url)
    return None if data is None else _opened(kind, data, url)


def write(record: Record, url: str) -> None:
    storage.write_bytes(url, sealed(record))


_SEAL = b',\n "record_sha256": "'


def sealed(record: Record) -> bytes:
    """Its JSON, with a last field `record_sha256`: of the JSON without it."""
    text = record.model_dump_json(indent=1).encode()
    return text[:-2] + _SEAL + storage.sha256(text).encode() + b'"\n}\n'


def _opened(kind: type[R], data: bytes, url: str) -> R:
    head, _, tail = data.rpartition(_SEAL)
    text = head + b"\n}"
    if tail != storage.sha256(text).encode() + b'"\n}\n':
        raise DamagedError(f"{url} was altered, or is no record of this version\n  do: bring it back, or make it again")
    return kind.from_bytes(text, where=url)


class Shard(Record):
    name: str
    split: Split
    num_bytes: int
    sha256: str
    labels: tuple[int, ...]
    """One a sample, in the order of the shard."""
    paths: tuple[str, ...]
    """Where each sample lay in the source."""

    @property
    def num_samples(self) -> int:
        return len(self.labels)


class Manifest(Record):
    """What was packed. Sample ids of a split count through its shards in this order."""

    format: Literal[1] = 1
    name: str
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    pixels_sha256: str
    """Of `pixels.u64`: 8 bytes of the SHA-256 of each image's pixels, little endian, in the order of the shards."""
    source: str
    """What was packed, by its own name; never a path of the machine."""
    source_sha256: str
    """Over (path, SHA-256) of every file of the source, sorted by path."""
    synthetic: bool
    notes: tuple[str, ...]
    """What was decided or found while packing: how splits came about, leaks between them, files left out."""
    digest: str
    """SHA-256 over all other fields."""

    @classmethod
    def sealed(cls, **fields: Any) -> Self:
        unsealed = cls(digest="", **fields)
        return unsealed.model_copy(update={"digest": unsealed.expected_digest()})

    def expected_digest(self) -> str:
        return digest_of(self.model_dump(mode="json", exclude={"digest"}))

    def labels(self, split: Split) -> tuple[int, ...]:
        return tuple(label for shard in self.shards if shard.split == split for label in shard.labels)

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)


class LineageEntry(Record):
    """A data set that a checkpoint or one of its ancestors saw; the images' digests lie in the run's model file."""

    dataset: str
    digest: str
    run: str


class InitSource(Record):
    """Where a run's first weights come from, where not from scratch."""

    run: str
    """`<recipe>-seed<N>` under the same id, or the URL that was given."""
    identity: str
    """Digest of the source run's request, or the SHA-256 of the weights that were named."""


class RunConfig(Record):
    """A run's request: everything that decides its result. The placement is not in it."""

    catalogue: str
    recipe: Recipe
    seed: int
    data_digest: str
    init: InitSource | None
    synthetic: bool
    """The data, or what its first weights were trained on, are no photographs."""

    @property
    def name(self) -> str:
        return f"{self.recipe.name}-seed{self.seed}"

    @property
    def source_run(self) -> str | None:
        """The run of the same suite that has to be finished first."""
        return self.init.run if self.init and "/" not in self.init.run else None

    def settings(self) -> dict[str, Any]:
        """What runs of one recipe share, whatever their seed."""
        identity = self.init.identity if self.init and self.source_run is None else None
        return {"recipe": asdict(self.recipe), "data_digest": self.data_digest, "init": identity}

    def digest(self) -> str:
        """Of all that decides the result: weights that were named are known by their own digest, not by their place."""
        return digest_of(self.model_dump(mode="json", exclude={"catalogue": True, "synthetic": True, "init": {"run"}}))


class Scores(Record):
    """Exact: each sample of the split counted once, at any number of workers."""

    num_samples: int
    loss: float
    accuracy: float
    confusion: tuple[tuple[int, ...], ...]
    """confusion[label][prediction]"""


PREDICTED = (("sample", "<i8"), ("label", "<u2"), ("prediction", "<u2"), ("probability", "<f4"))
"""Columns of a run's predictions: a row a test sample, by its id; the probability is the prediction's."""


class PredictedSample(Record):
    """One prediction for the page, with its image."""

    label: int
    prediction: int
    probability: float
    png_base64: str


class Placement(Record):
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions(Strict):
    """How a run is carried out: flags of `train` and `suite` that change no bit of its result."""

    num_workers: Count = 1
    """Workers of each run; two or more is DDP."""
    cpus_per_worker: Amount | None = None
    """One unless given."""
    gpus_per_worker: Amount | None = None
    """One where there are GPUs, else none."""
    checkpoint_every_n_steps: Count | None = None
    """Beside the checkpoint at every epoch's end; a kill loses at most this many steps. Unless given, a checkpoint is
    made as often as its measured cost and the run's failures so far make worth while."""
    checkpoint_keep: Annotated[int, Field(ge=0)] = 0
    """So many recent checkpoints stay beside the best and the last two."""
    checkpoint_budget_mb: Amount | None = None
    """Of one run's checkpoints; recent ones go until it holds, the best and the last two always stay."""
    accept_different_numerics: bool = False
    """Go on with runs that stopped under other library versions, hardware, threads or number of workers."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a run is begun again after a worker or its controller died; preempted nodes do not count."""
    hang_timeout_s: Annotated[float, Field(ge=1)] = 120.0
    """A worker that does not answer, or a collective that does not end, is a failure after so many seconds."""
    verbose: bool = False
    """Ray's and Lightning's own lines too, and tracebacks."""


def check_flags(flags: Any) -> None:
    """Raises RecipeError, by the name of the flag, where a field of this strict dataclass is out of its type's range."""
    try:
        TypeAdapter(type(flags)).validate_python(flags)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][-1]).replace("_", "-")
        raise RecipeError(f"--{flag} {first['input']}: {first['msg'].removeprefix('Input ')}") from None


class RunResult(Record):
    """What a run came to. A run is over when this lies in its folder, finished or failed."""

    name: str
    catalogue: str
    recipe: Recipe
    seed: int
    digest: str
    status: Literal["finished", "failed", "stopped", "blocked", "open"]
    """`stopped` by a search. On a page only: `blocked` waited for a source that failed, `open` is not finished yet."""
    error: str | None = None
    log_tail: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    epochs: int = 0
    steps: int = 0
    best_epoch: int | None = None
    num_train: int = 0
    val: Scores | None = None
    """Of the best checkpoint."""
    test: Scores | None = None
    """Of the best checkpoint, looked at once; None for a trial of a search, which is not tested."""
    examples: tuple[PredictedSample, ...] = ()
    seconds: dict[str, float] = {}
    """By phase."""
    images_per_s: float | None = None
    """Training samples per second, augmentation and steps, without validation."""
    storage: dict[str, float] = {}
    """What went over a network (`imgcls.storage.Traffic`): of all ranks, and of rank 0's earlier attempts."""
    checkpoint: str | None = None
    weights_sha256: str | None = None
    """Of the last step's state_dict."""
    best_weights_sha256: str | None = None
    """Of the state_dict in the run's model file."""
    model_sha256: str | None = None
    """Of the model file itself."""
    predictions_sha256: str | None = None
    """Of the file of its predictions; None for runs of earlier versions."""
    history_sha256: str | None = None
    """Of the history as CSV."""
    num_parameters: int = 0
    data_digest: str
    synthetic: bool = False
    init: InitSource | None = None
    lineage: tuple[LineageEntry, ...] = ()
    placement: Placement | None = None
    versions: dict[str, str] = {}
    hardware: dict[str, str] = {}
    numerics_changes: tuple[str, ...] = ()
    """What differed when the run went on under other numerics, before / after, as was accepted."""
    commit: str | None = None

    @classmethod
    def of(cls, config: RunConfig, **fields: Any) -> Self:
        """A result of the run that `config` asks for."""
        return cls(name=config.name, digest=config.digest(), **dict(config), **fields)


class Audit(Record):
    """What somebody found who trained pieces of a run again, and tested its model again."""

    at: str
    seed: int
    """By which the pieces were drawn."""
    steps: tuple[str, ...]
    num_pieces: int
    """Between two checkpoints of the run: so many could have been drawn."""
    difference: str
    """The first thing that differs; empty where nothing does."""
    commit: str
    hardware: dict[str, str]

    @property
    def told(self) -> str:
        pieces = f"{len(self.steps)} of {self.num_pieces} pieces, seed {self.seed}"
        found = self.difference or "weights, optimizer, history and scores are equal"
        until = " up to the first difference" * bool(self.difference)
        return f"steps {', '.join(self.steps)} trained again{until} ({pieces}): {found}"


class Lease(Record):
    command: str
    host: str
    pid: int
    renewals: int
    released: bool = False
    """Nobody holds the run; the file stays, so that its number is not used again."""


class SuiteRecord(Record, extra="ignore"):  # earlier versions said more
    """What the last command under an id said; which runs there are, their own folders say."""

    id: str
    data: str
    search: Search | None = None
    """The runs are its trials."""


class SuiteResults(Record):
    """What the page shows: every run that was ever asked for under the id."""

    id: str
    catalogue: str
    url: str
    """Of the suite's folder, and of the folder of packed sets: as seen from where the command ran."""
    data: str
    synthetic: bool
    runs: tuple[RunResult, ...]
    seconds: float = 0.0
    """Of the last command, without packing."""
    command: str = ""
    predicted_s: float | None = None
    """Of the last command, before it began; None where a rate was unknown."""
    predicted: dict[str, float] = {}
    """By run that the last command began, seconds from its start to its end; `took` beside it."""
    took: dict[str, float] = {}
    search: Search | None = None

    @property
    def finished(self) -> list[RunResult]:
        return [run for run in self.runs if run.status == "finished"]

    @property
    def best(self) -> RunResult | None:
        """Of a search: the finished trial whose best checkpoint has the best metric."""
        by_loss = self.search is not None and self.search.metric == "val/loss"
        found = [(-run.val.loss if by_loss else run.val.accuracy, -i) for i, run in enumerate(self.finished) if run.val]
        return self.finished[-max(found)[1]] if found else None
