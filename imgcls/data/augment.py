"""A batch of stored pixels -> a batch of inputs, on the batch's device, each sample by its own random numbers.

A flip is an index; a turn or a crop is one `grid_sample`; colours follow torchvision's definitions of brightness,
contrast, saturation and hue, in this order (torchvision draws an order a batch). Nothing waits for the device.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from imgcls.models.resnet18 import LUMINANCE
from imgcls.recipe import Augment, Input

NUM_UNIFORMS = 9
"""A sample draws this many, whatever the recipe uses: a changed recipe moves no other number."""
_AT_ONCE = 3 * 32 * 64 * 64
"""So many values of inputs are augmented at once by a CPU's thread: what is in between then stays in its cache."""


def inputs(images: Tensor, into: Input) -> Tensor:
    """images: uint8, (b, h, w, c). Returns the network's inputs, (b, c, px, px), channels last."""
    # (b, h, w, c) seen as (b, c, h, w) is channels last already: nothing is copied but the conversion.
    x = _resized(images.permute(0, 3, 1, 2).float().div_(255), into.px)
    return x.sub_(into.mean).div_(into.std).contiguous(memory_format=torch.channels_last)


def augmented_inputs(images: Tensor, uniforms: Tensor, augment: Augment, into: Input) -> Tensor:
    """images: uint8, (b, h, w, c); uniforms: [0, 1), (b, NUM_UNIFORMS). Returns as `inputs` does."""
    moves = augment.rotate_degrees > 0 or augment.crop_min_area < 1
    if augment.flip and not moves:
        # Bytes wrap: the difference comes back exactly. On a CPU five times as quick as `torch.where`.
        images = images + (images.flip(2) - images).mul_((uniforms[:, 0] < 0.5).to(torch.uint8).view(-1, 1, 1, 1))
    if augment == Augment(flip=augment.flip):
        return inputs(images, into)
    shape = (len(images), into.channels, into.px, into.px)
    whole = torch.empty(shape, device=images.device, memory_format=torch.channels_last)
    at_once = max(1, _AT_ONCE * torch.get_num_threads() // whole[0].numel()) if whole.device.type == "cpu" else len(whole)
    for part, pixels, u in zip(whole.split(at_once), images.split(at_once), uniforms.split(at_once), strict=True):
        # Each channel a plane of its own: colours go through whole planes.
        x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        x = _moved(x, u.view(-1, NUM_UNIFORMS, 1, 1), augment, into.px) if moves else _resized(x, into.px)
        part.copy_(_coloured(x, u.view(-1, NUM_UNIFORMS, 1, 1, 1), augment).sub_(into.mean).div_(into.std))
    return whole


def _resized(x: Tensor, px: int) -> Tensor:
    return x if x.shape[-1] == px else F.interpolate(x, size=(px, px), mode="bilinear", antialias=False)


def _moved(x: Tensor, u: Tensor, augment: Augment, px: int) -> Tensor:
    """Mirrored, turned, cropped; of a size of px. u: (b, NUM_UNIFORMS, 1, 1)."""
    side = (1 - u[:, 2] * (1 - augment.crop_min_area)).sqrt()
    right, down = ((2 * u[:, i] - 1) * (1 - side) for i in (3, 4))
    turn = torch.polar(side, (2 * u[:, 1] - 1) * math.radians(augment.rotate_degrees))
    # From an output's place to the input's place that it shows, in the complex plane: mirror, turn, shrink to the crop.
    places = torch.arange(1 - px, px, 2, device=x.device) / px
    across = places * torch.where(u[:, 0] < 0.5, -1.0, 1.0) if augment.flip else places
    shown = (turn * across + torch.complex(right, down)) + turn * 1j * places.view(px, 1)
    moved = F.grid_sample(x, torch.view_as_real(shown), mode="bilinear", padding_mode="border", align_corners=False)
    if augment.rotate_degrees:  # black outside; "zeros" would darken the image's own border too
        moved *= (torch.maximum(shown.real.abs(), shown.imag.abs()) <= 1).unsqueeze(1)
    return moved


def _coloured(x: Tensor, u: Tensor, augment: Augment) -> Tensor:
    """Changes x, (b, c, px, px), in its place. u: (b, NUM_UNIFORMS, 1, 1, 1)."""
    amounts = augment.brightness, augment.contrast, augment.saturation
    brightness, contrast, saturation = (1 + (2 * u[:, 5 + i] - 1) * amount for i, amount in enumerate(amounts))
    if augment.brightness:
        x.mul_(brightness).clamp_(0, 1)
    if augment.contrast:
        mean = _gray(x.mean(dim=(2, 3), keepdim=True)).mul_(1 - contrast)
        x.mul_(contrast).add_(mean).clamp_(0, 1)
    if augment.saturation and x.shape[1] == 3:
        gray = _gray(x).mul_(1 - saturation)
        x.mul_(saturation).add_(gray).clamp_(0, 1)
    return _turned_hue(x, (2 * u[:, 8] - 1) * augment.hue) if augment.hue and x.shape[1] == 3 else x


def _gray(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    red, green, blue = (x[:, i : i + 1] * part for i, part in enumerate(LUMINANCE))
    return red.add_(green).add_(blue)


def _turned_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Hue plus `turn` (b, 1, 1, 1), in turns; value and saturation stay. Source: the HSV formulas, without their cases.

    Hues are angles in sixths of a turn, red at 0, green at 2, blue at 4. From red a hue is 2 + (g + b - r - value) / chroma
    away, towards green where g > b. A channel has all of the chroma up to 1 from its own hue, and none from 2 on.
    """
    r, g, b = (x[:, i : i + 1] for i in range(3))
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    from_red = (g + b).sub_(r).sub_(value).div_(chroma.clamp_min(1e-8)).add_(2)
    hue = torch.copysign(from_red, g - b).add_(6 * turn)
    hue -= (hue / 6).round_().mul_(6)
    away = (hue - 2 * torch.arange(3, device=x.device).view(3, 1, 1)).abs_()
    lacks = away.sub_(3).abs_().neg_().add_(2).clamp_(0, 1)
    return torch.sub(value, lacks.mul_(chroma), out=x)
