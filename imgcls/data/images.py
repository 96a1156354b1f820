"""One image file to pixels: the only place that decodes. Light to import, for the processes that do nothing else."""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

DECODER = f"pillow{PIL.__version__}"
"""In the name of every cache: another version may decode or resize to other bits."""

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})

T = TypeVar("T")
U = TypeVar("U")


def decode(data: bytes) -> Image.Image:
    """The image as a person sees it, RGB: turned by its EXIF orientation, transparency over white, 16 bits to 8.

    Raises OSError, ValueError or SyntaxError, Pillow's own, where `data` is not a whole image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise UnidentifiedImageError("no image of a known format") from None
    if turned.mode.startswith("I") or turned.mode == "F":
        # Pillow clips wide gray at 255 instead of scaling it; "I" and "F" may hold 8 bits or 16.
        wide = np.asarray(turned).astype(np.float64)
        top = 65535.0 if turned.mode.startswith("I;16") or wide.max(initial=0) > 255 else 255.0
        turned = Image.fromarray((wide * 255 / top).clip(0, 255).round().astype(np.uint8))
    if turned.has_transparency_data:
        over = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return turned.convert("RGB")


def pixels_digest(image: Image.Image) -> bytes:
    """8 bytes of the SHA-256 of size and pixels: equal for equal pictures, whatever the file format."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).digest()[:8]


def stored_pixels(image: Image.Image, *, px: int, channels: int) -> np.ndarray:
    """The central square, resized and then turned gray where asked: uint8, (px, px, channels)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    if square != (0, 0, px, px):
        image = image.resize((px, px), Image.Resampling.BILINEAR, box=square)
    if channels == 1:
        image = image.convert("L")
    return np.asarray(image).reshape(px, px, channels)


def encode_png(pixels: np.ndarray) -> bytes:
    """pixels: uint8, (h, w, 3) or (h, w, 1)."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG", compress_level=6)
    return file.getvalue()


@contextmanager
def decoding_pool() -> Iterator[Executor]:
    """One process a core. Threads were tried: Pillow holds the interpreter too long at 32 px to gain from them."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield pool


def in_order(pool: Executor, work: Callable[[list[T]], U], items: Iterable[T], *, at_once: int) -> Iterator[U]:
    """`work` over lists of `at_once` items, in order, with a bounded number of lists under way."""
    iterator = iter(items)
    lists = iter(lambda: list(islice(iterator, at_once)), [])
    window = [pool.submit(work, some) for some in islice(lists, 2 * (os.cpu_count() or 1) + 1)]
    while window:
        yield window.pop(0).result()
        window += [pool.submit(work, some) for some in islice(lists, 1)]
