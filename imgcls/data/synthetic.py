"""Procedural images in the shapes of both data sets, for tests and for a machine without data or network.

Ten classes are ten drawings (a disc, a ring, stripes, ...) at random place, size and colour on a noisy ground. Both
data sets draw the same ten, in another order, so that what one teaches helps on the other. Whatever comes of them is
labelled SYNTHETIC.
"""

import numpy as np

from imgcls.data.archives import Bytes
from imgcls.data.order import hash64, uniforms
from imgcls.data.sources import Sample, Source
from imgcls.records import Split

CLASS_NAMES = ("disc", "ring", "square", "cross", "triangle", "rows", "columns", "diagonal", "checks", "dots")
DEFAULT_NUM_SAMPLES = 3000


def synthetic_source(dataset: str, num_samples: int = DEFAULT_NUM_SAMPLES) -> Source:
    """`num_samples` training images and a fifth as many test images; the same bits for the same arguments."""
    key = int(hash64(*dataset.encode())[0] >> np.uint64(33))
    turn = key % len(CLASS_NAMES)
    names = CLASS_NAMES[turn:] + CLASS_NAMES[:turn]
    px = 96 if dataset == "imagenette" else 32
    counts: dict[Split, int] = {"train": num_samples, "test": max(len(names), num_samples // 5)}
    samples = []
    for number, (split, count) in enumerate(counts.items()):
        for i in range(count):
            label = i % len(names)
            pixels = _draw(names[label], key=key, px=px, number=number, i=i)
            content = Bytes(pixels.nbytes, member=pixels)
            samples.append(Sample(f"{split}/{names[label]}/{i:06d}.png", label, split, content))
    note = f"{num_samples:,} procedural training images, no photograph among them"
    return Source("synthetic", names, tuple(samples), (note,), f"synthetic-{dataset}-{num_samples}", synthetic=True)


def _draw(name: str, *, key: int, px: int, number: int, i: int) -> np.ndarray:
    u = uniforms(key, number, np.array([i]), 12)[0]
    noise = uniforms(key, number + 2, np.array([i]), px * px).reshape(px, px, 1)
    across, down = np.meshgrid(np.linspace(-1, 1, px), np.linspace(-1, 1, px))
    x, y = across - (u[0] - 0.5) * 0.8, down - (u[1] - 0.5) * 0.8
    size = 0.35 + 0.3 * u[2]
    radius, square = np.hypot(x, y), np.maximum(abs(x), abs(y))
    waves = 7 + 5 * u[3]
    shape = {
        "disc": radius < size,
        "ring": abs(radius - size) < size / 4,
        "square": square < size,
        "cross": (np.minimum(abs(x), abs(y)) < size / 4) & (square < size),
        "triangle": (y > -size) & (y < size) & (abs(x) < (y + size) / 2),
        "rows": np.sin(waves * y + u[4]) > 0,
        "columns": np.sin(waves * x + u[4]) > 0,
        "diagonal": np.sin(waves * (x + y) * 0.7 + u[4]) > 0,
        "checks": np.sin(waves * x) * np.sin(waves * y) > 0,
        "dots": (np.sin(waves * x) > 0.5) & (np.sin(waves * y) > 0.5),
    }[name][..., None]
    ground, ink = 0.45 * u[5:8], 0.5 + 0.5 * u[8:11]
    picture = np.where(shape, ink, ground) + 0.35 * (noise - 0.5)
    return (picture.clip(0, 1) * 255).astype(np.uint8)
