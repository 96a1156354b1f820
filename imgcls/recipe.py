"""The types of a recipe: all that decides a result, and nothing else.

Goes in: values from `imgcls.catalogue`, from `--set` or from a TOML file. Comes out: one frozen `Recipe` with a digest.
Called by the jobs (to choose), by `training.fit` (to build), by `results` (to show).
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from imgcls.errors import RecipeError

Fraction = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Strict:
    """Fields are checked strictly where a value comes in from outside (flags, `--set`, TOML, JSON)."""

    __slots__ = ()
    # Instances too, so that a recipe is the same value from Python and from JSON: 10 and 10.0 would have two digests.
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, revalidate_instances="always")


@dataclass(frozen=True, kw_only=True, slots=True)
class Input(Strict):
    px: Count
    """Side of the network's square input, pixels."""
    channels: Literal[1, 3]
    """1 is gray (luminance), 3 is RGB."""
    stored_px: Count
    """Side at which the cache keeps images; enlarged on the device where it differs from `px`."""
    mean: float = 0.5
    std: Annotated[float, Field(gt=0)] = 0.25
    """Inputs are (pixel / 255 - mean) / std. One number for all channels: only so does a gray network, inflated to
    RGB, compute exactly what it computed (see `imgcls.models.resnet18.transferred`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BasicCNN(Strict):
    kind: Literal["basic-cnn"] = "basic-cnn"
    dropout: Probability = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNet18(Strict):
    kind: Literal["resnet18"] = "resnet18"
    dropout: Probability = 0.0
    """Before the classifier."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scratch(Strict):
    kind: Literal["scratch"] = "scratch"


@dataclass(frozen=True, kw_only=True, slots=True)
class FromRun(Strict):
    """Weights of the best checkpoint of the source recipe's run with the same seed, under the same id."""

    kind: Literal["from-run"] = "from-run"
    recipe: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment(Strict):
    """How a training sample is changed; every number is drawn from (seed, epoch, sample), see `data.augment`."""

    flip: bool = False
    """Mirrored left to right with probability one half."""
    rotate_degrees: Amount = 0.0
    """Turned by an angle drawn from plus or minus this; what comes from outside the image is black."""
    crop_min_area: Fraction = 1.0
    """A square crop of at least this fraction of the image's area, enlarged to the input size; 1 is no crop."""
    brightness: Probability = 0.0
    contrast: Probability = 0.0
    saturation: Probability = 0.0
    """Factors drawn from 1 plus or minus this."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Turns of the colour circle, drawn from plus or minus this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adam(Strict):
    kind: Literal["adam"] = "adam"
    lr: Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW(Strict):
    kind: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Amount = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant(Strict):
    kind: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True, slots=True)
class OneCycle(Strict):
    """Linear from 0 to the optimizer's rate over `warmup`, then linear to 0 at the last planned step."""

    kind: Literal["one-cycle"] = "one-cycle"
    warmup: Fraction = 0.25
    """Fraction of all planned steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Length(Strict):
    epochs: Count
    """At most this many."""
    patience: Count | None = None
    """Stop after this many epochs without a lower val/loss; None never stops early."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut(Strict):
    """Validation where the data set brings none beside its test set: cut from the training split, stratified."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    seed: Seed = 42


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    dataset: Annotated[str, Field(pattern=r"^[^/.][^/]*$")]
    """Name of a packed set, `<data>/<dataset>/`."""
    input: Input
    model: Annotated[BasicCNN | ResNet18, Field(discriminator="kind")]
    init: Annotated[Scratch | FromRun, Field(discriminator="kind")] = Scratch()
    augment: Augment = Augment()
    optimizer: Annotated[Adam | AdamW, Field(discriminator="kind")]
    schedule: Annotated[Constant | OneCycle, Field(discriminator="kind")] = Constant()
    length: Length
    global_batch_size: Annotated[int, Field(ge=2)]
    """Samples a step over all ranks; the placement only cuts it into parts."""
    last_batch: Literal["drop", "keep"] = "drop"
    """What happens to the last partial global batch of an epoch."""
    validation: Cut = Cut()
    train_fraction: Fraction = 1.0
    """Of the training samples that the cut leaves, stratified, by the cut's seed."""
    label_smoothing: Probability = 0.0
    """In training only; val/loss and test/loss are plain cross-entropy."""
    averaging: Annotated[Probability, Field(exclude_if=lambda value: not value)] = 0.0
    """Weight of the earlier average in each step's new one. The average is validated, tested and kept. 0: no average."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast; weights and sums stay fp32."""
    numerics: Literal["ddp", "elastic"] = "ddp"
    """ddp: the last bits depend on the number of workers. elastic: they do not, see `training.elastic`; slower."""
    virtual_ranks: Count = 4
    """Parts of a global batch under elastic numerics, each with its own batch norm; a power of two."""

    def __post_init__(self) -> None:
        if self.virtual_ranks & (self.virtual_ranks - 1):
            raise ValueError(f"virtual_ranks is {self.virtual_ranks}: a power of two, as 2, 4 or 8")
        if isinstance(self.model, BasicCNN) and self.input.px < 8:
            raise ValueError(f"basic-cnn halves its input three times: input.px is {self.input.px}, 8 is the least")

    def to_json(self) -> dict[str, Any]:
        """Without a field that is newer than recipes on record and has the value that stood for it then."""
        return _ADAPTER.dump_python(self, mode="json")


_ADAPTER = TypeAdapter(Recipe)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, written in one way only."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def recipe_from_json(value: dict[str, Any], *, where: str) -> Recipe:
    """A checked recipe. Raises RecipeError with each wrong field by its path and, for unknown ones, those that exist."""
    try:
        return _ADAPTER.validate_json(json.dumps(value, default=str))  # TOML has dates, no field is one
    except ValidationError as error:
        lines = [_explain(e["loc"], e["msg"]) for e in error.errors()]
        raise RecipeError(f"{where}: " + "\n  ".join(lines)) from None


def derive(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """`recipe` with the fields at dotted paths replaced: `derive(RESNET18, {"optimizer.lr": 0.2})`."""
    value = asdict(recipe)
    for path, new in changes.items():
        part, _, leaf = path.rpartition(".")
        place, name = (value[part], leaf) if isinstance(value.get(part), dict) else (value, path)
        place[name] = new  # a field that does not exist is refused below
    return recipe_from_json(value, where=f"recipe {recipe.name} with {', '.join(f'{k}={v}' for k, v in changes.items())}")


def parse_changes(texts: tuple[str, ...]) -> dict[str, Any]:
    """`--set FIELD=VALUE` texts; a value is JSON where it reads as JSON, else a string."""
    changes = {}
    for text in texts:
        path, equals, raw = text.partition("=")
        if not equals or not path:
            raise RecipeError(f"--set {text}: write --set FIELD=VALUE, as --set optimizer.lr=0.01")
        changes[path] = raw
        with suppress(json.JSONDecodeError):
            changes[path] = json.loads(raw)
    return changes


def changes_between(base: Recipe, recipe: Recipe) -> dict[str, Any]:
    """What `derive` needs to make `recipe` of `base`, by path; a part of another kind is replaced as a whole."""
    changes: dict[str, Any] = {}
    old = asdict(base)
    for name, new in asdict(recipe).items():
        if isinstance(new, dict) and new.keys() == old[name].keys():
            changes |= {f"{name}.{leaf}": value for leaf, value in new.items() if value != old[name][leaf]}
        elif new != old[name]:
            changes[name] = new
    return changes


def differing_fields(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Dotted paths at which two JSON objects differ, each with both values."""
    left, right = leaves(a), leaves(b)
    paths = sorted(left.keys() | right.keys())
    return [f"{path}: {left.get(path)} / {right.get(path)}" for path in paths if left.get(path) != right.get(path)]


def leaves(value: dict[str, Any], *, until: str = "", prefix: str = "") -> dict[str, Any]:
    """The values in nested JSON objects, by dotted path. An object that has the field `until` is a value itself."""
    found: dict[str, Any] = {}
    for name, inner in value.items():
        nested = isinstance(inner, dict) and until not in inner
        found |= leaves(inner, until=until, prefix=f"{prefix}{name}.") if nested else {prefix + name: inner}
    return found


def _explain(loc: tuple[int | str, ...], message: str) -> str:
    # Of three names the middle one is the tag of a union: `optimizer.adam.lr` is the field `optimizer.lr`.
    path = ".".join(map(str, (loc[0], loc[-1]) if len(loc) == 3 else loc))
    if "unexpected" in message.lower():
        return f"unknown field {path}; known here: {', '.join(_known_fields(loc))}"
    return f"{path or 'as a whole'}: {message.removeprefix('Value error, ')}"


def _known_fields(loc: tuple[int | str, ...]) -> list[str]:
    """Fields of the part in which a location ends, by the types of Recipe."""
    part = get_type_hints(Recipe).get(str(loc[0]), Recipe)
    known = next((kind for kind in get_args(part) if fields(kind)[0].default == loc[1]), part)
    return [field.name for field in fields(known)]
