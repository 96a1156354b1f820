"""A batch of stored pixels -> a batch of inputs, on the batch's device, each sample by its own random numbers.

Geometry is one affine map a sample and one `grid_sample`; colours follow torchvision's definitions of brightness,
contrast, saturation and hue, in this order (torchvision draws an order a batch).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from imgcls.models.resnet18 import LUMINANCE
from imgcls.recipe import Augment, Input

NUM_UNIFORMS = 9
"""A sample draws this many, whatever the recipe uses: a changed recipe moves no other number."""


def inputs(images: Tensor, into: Input) -> Tensor:
    """images: uint8, (b, h, w, c). Returns the network's inputs, (b, c, px, px), channels last."""
    return _normalize(_resized(_scaled(images), into.px), into)


def augmented_inputs(images: Tensor, uniforms: Tensor, augment: Augment, into: Input) -> Tensor:
    """images: uint8, (b, h, w, c); uniforms: [0, 1), (b, NUM_UNIFORMS). Returns as `inputs` does."""
    x = _scaled(images)
    if augment.flip or augment.rotate_degrees or augment.crop_min_area < 1:
        x = _moved(x, uniforms, augment, into.px)
    else:
        x = _resized(x, into.px)
    return _normalize(_coloured(x, uniforms, augment), into)


def _scaled(images: Tensor) -> Tensor:
    # (b, h, w, c) seen as (b, c, h, w) is channels last already: nothing is copied but the conversion.
    return images.permute(0, 3, 1, 2).float() / 255


def _normalize(x: Tensor, into: Input) -> Tensor:
    return ((x - into.mean) / into.std).contiguous(memory_format=torch.channels_last)


def _resized(x: Tensor, px: int) -> Tensor:
    return x if x.shape[-1] == px else F.interpolate(x, size=(px, px), mode="bilinear", antialias=False)


def _moved(x: Tensor, u: Tensor, augment: Augment, px: int) -> Tensor:
    mirror = torch.where(u[:, 0] < 0.5, -1.0, 1.0) if augment.flip else torch.ones_like(u[:, 0])
    angle = (2 * u[:, 1] - 1) * math.radians(augment.rotate_degrees)
    side = (1 - u[:, 2] * (1 - augment.crop_min_area)).sqrt()
    right, down = ((2 * u[:, i] - 1) * (1 - side) for i in (3, 4))
    cos, sin = side * angle.cos(), side * angle.sin()
    # From an output's place to the input's place that it shows: turn, shrink to the crop, mirror.
    rows = [torch.stack([cos * mirror, -sin, right], 1), torch.stack([sin * mirror, cos, down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [len(x), x.shape[1], px, px], align_corners=False)
    moved = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if augment.rotate_degrees:  # black outside; "zeros" would darken the image's own border too
        moved = moved * (grid.abs().amax(dim=-1) <= 1).unsqueeze(1)
    return moved


def _coloured(x: Tensor, u: Tensor, augment: Augment) -> Tensor:
    def factor(i: int, amount: float) -> Tensor:
        return (1 + (2 * u[:, i] - 1) * amount).view(-1, 1, 1, 1)

    if augment.brightness:
        x = (x * factor(5, augment.brightness)).clamp(0, 1)
    if augment.contrast:
        x = _blend(x, _gray(x).mean(dim=(1, 2, 3), keepdim=True), factor(6, augment.contrast))
    if augment.saturation and x.shape[1] == 3:
        x = _blend(x, _gray(x), factor(7, augment.saturation))
    if augment.hue and x.shape[1] == 3:
        x = _turned_hue(x, (2 * u[:, 8] - 1) * augment.hue)
    return x


def _gray(x: Tensor) -> Tensor:
    return x if x.shape[1] == 1 else (x * x.new_tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _turned_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Hue plus `turn` (b,), in turns; value and saturation stay. Source: the HSV formulas, written without branches."""
    r, g, b = x.unbind(1)
    value, least = x.amax(1), x.amin(1)
    chroma = value - least
    safe = chroma.clamp_min(1e-8)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue + 6 * turn.view(-1, 1, 1)
    shifted = [(hue + n) % 6 for n in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in shifted], 1)
