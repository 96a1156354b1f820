import math
from typing import Literal

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from imgcls.data import augment as augmentation
from imgcls.data.augment import NUM_UNIFORMS, augmented_inputs, inputs
from imgcls.recipe import Augment, Input

PLAIN = Input(px=24, channels=3, stored_px=24, mean=0.0, std=1.0)


def pictures(count: int = 5, px: int = 24, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, px, px, channels), dtype=np.uint8))


def uniforms(value: float = 0.5, count: int = 5, **at: float) -> torch.Tensor:
    u = torch.full((count, NUM_UNIFORMS), value)
    for column, other in at.items():
        u[:, int(column.removeprefix("u"))] = other
    return u


def scaled(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


def test_inputs_are_normalized_and_channels_last():
    images = pictures()
    x = inputs(images, Input(px=24, channels=3, stored_px=24))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(x, (scaled(images) - 0.5) / 0.25)


def test_no_augmentation_gives_the_evaluations_inputs():
    into = Input(px=48, channels=3, stored_px=24)
    assert torch.equal(augmented_inputs(pictures(), uniforms(), Augment(), into), inputs(pictures(), into))


def test_enlarging_by_the_affine_map_is_enlarging_by_interpolation():
    into = Input(px=48, channels=3, stored_px=24, mean=0.0, std=1.0)
    moved = augmented_inputs(pictures(), uniforms(u0=0.9), Augment(flip=True), into)
    assert torch.allclose(moved, inputs(pictures(), into), atol=1e-5)


def test_a_flip_is_a_mirror():
    flipped = augmented_inputs(pictures(), uniforms(u0=0.1), Augment(flip=True), PLAIN)
    assert torch.allclose(flipped, scaled(pictures()).flip(3), atol=1e-5)


@pytest.mark.parametrize("turn", [-1.0, -0.3, 0.7])
def test_a_turn_is_torchvisions_inside_the_image(turn: float):
    degrees = 10.0
    ours = augmented_inputs(pictures(), uniforms(u1=(turn + 1) / 2), Augment(rotate_degrees=degrees), PLAIN)
    theirs = reference.rotate(scaled(pictures()), turn * degrees, interpolation=reference.InterpolationMode.BILINEAR)
    assert torch.allclose(ours[..., 6:-6, 6:-6], theirs[..., 6:-6, 6:-6], atol=2e-3)


def test_what_a_turn_brings_in_from_outside_is_black():
    white = torch.full((1, 24, 24, 3), 255, dtype=torch.uint8)
    turned = augmented_inputs(white, uniforms(u1=1.0, count=1), Augment(rotate_degrees=45), PLAIN)
    assert turned[0, :, 0, 0].tolist() == [0, 0, 0]
    assert turned[0, :, 12, 12].tolist() == pytest.approx([1, 1, 1])


def test_a_crop_shows_its_fraction_of_the_image():
    ramp = torch.arange(24, dtype=torch.uint8).repeat(24, 1)[None, :, :, None].repeat(1, 1, 1, 3)
    cropped = augmented_inputs(ramp, uniforms(u0=0.9, u2=1.0, count=1), Augment(crop_min_area=0.25), PLAIN) * 255
    assert float(cropped[0, 0, 12, -1] - cropped[0, 0, 12, 0]) == pytest.approx(11.5, abs=0.3)


@pytest.mark.parametrize(
    ("augment", "column", "ours"),
    [
        (Augment(brightness=0.2), 5, reference.adjust_brightness),
        (Augment(contrast=0.2), 6, reference.adjust_contrast),
        (Augment(saturation=0.2), 7, reference.adjust_saturation),
    ],
)
def test_colours_are_torchvisions(augment: Augment, column: int, ours):
    drawn = augmented_inputs(pictures(), uniforms(0.5, 5, **{f"u{column}": 0.9}), augment, PLAIN)
    assert torch.allclose(drawn, ours(scaled(pictures()), 1 + 0.8 * 0.2), atol=2e-3)


@pytest.mark.parametrize("u", [0.0, 0.3, 0.95])
def test_hue_is_torchvisions(u: float):
    drawn = augmented_inputs(pictures(), uniforms(u8=u), Augment(hue=0.1), PLAIN)
    assert torch.allclose(drawn, reference.adjust_hue(scaled(pictures()), (2 * u - 1) * 0.1), atol=1e-5)


EVERYTHING = Augment(flip=True, rotate_degrees=10, crop_min_area=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.5)


def random_uniforms(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).random((count, NUM_UNIFORMS), dtype=np.float32))


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_a_sample_is_augmented_alike_in_any_company(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(augmentation, "_AT_ONCE", at_once * 3 * 24 * 24 // torch.get_num_threads())
    images, u = pictures(7), random_uniforms(7)
    together = augmented_inputs(images, u, EVERYTHING, PLAIN)
    for i in range(7):
        assert torch.equal(augmented_inputs(images[i : i + 1], u[i : i + 1], EVERYTHING, PLAIN)[0], together[i])


@pytest.mark.parametrize(("px", "stored_px", "channels"), [(24, 24, 3), (37, 24, 3), (16, 25, 1)])
def test_everything_together_is_one_map_and_then_torchvisions_colours(px: int, stored_px: int, channels: Literal[1, 3]):
    into = Input(px=px, channels=channels, stored_px=stored_px, mean=0.0, std=1.0)
    images, u = pictures(9, stored_px, channels), random_uniforms(9)
    ours = augmented_inputs(images, u, EVERYTHING, into)
    for i, (x, (flip, turn, area, right, down, *colours)) in enumerate(zip(scaled(images), u.tolist(), strict=True)):
        mirror, angle, side = (-1 if flip < 0.5 else 1), math.radians((2 * turn - 1) * 10), math.sqrt(1 - area * 0.5)
        cos, sin, to = side * math.cos(angle), side * math.sin(angle), 1 - side
        rows = [[cos * mirror, -sin, (2 * right - 1) * to], [sin * mirror, cos, (2 * down - 1) * to]]
        grid = torch.nn.functional.affine_grid(torch.tensor([rows]), [1, channels, px, px], align_corners=False)
        moved = torch.nn.functional.grid_sample(x[None], grid, padding_mode="border", align_corners=False)[0]
        moved *= grid[0].abs().amax(-1) <= 1
        brightness, contrast, saturation = (1 + (2 * one - 1) * 0.2 for one in colours[:3])
        moved = reference.adjust_contrast(reference.adjust_brightness(moved, brightness), contrast)
        if channels == 3:
            moved = reference.adjust_hue(reference.adjust_saturation(moved, saturation), (2 * colours[3] - 1) * 0.5)
        assert torch.allclose(ours[i], moved, atol=2e-3)


def test_gray_images_take_what_applies_to_gray():
    into = Input(px=24, channels=1, stored_px=24, mean=0.0, std=1.0)
    augment = Augment(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
    x = augmented_inputs(pictures(channels=1), uniforms(), augment, into)
    assert torch.allclose(x, scaled(pictures(channels=1)), atol=1e-5)
    assert math.isfinite(float(x.sum()))
