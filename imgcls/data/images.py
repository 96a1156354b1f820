"""One image file to pixels: the only place that decodes. Light to import, for the processes that do nothing else."""

import hashlib
import io
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import TypeVar

import numpy as np
import PIL
from PIL import ExifTags, Image, UnidentifiedImageError

from imgcls.cpus import usable_cpus
from imgcls.errors import StorageError

DECODER = f"pillow{PIL.__version__}"
"""In the name of every cache: another version may decode or resize to other bits."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""No other is opened, whatever a file is called: PostScript would start a program."""
EXTENSIONS = {".jpg": "jpg", ".jpe": "jpg", ".jfif": "jpg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp", ".bmp": "bmp"}
"""Ending of a file's name -> ending in a shard, which other WebDataset readers know."""
TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), start=2))
"""What the values from 2 to 8 of EXIF's orientation ask for."""

AT_A_TIME = 64
"""Images that a process of the pool takes at a time."""
AHEAD = 4
"""Lists of so many images that wait for each process, or for their results to be taken."""

S = TypeVar("S")
T = TypeVar("T")


def decode(data: bytes) -> Image.Image:
    """The image as a person sees it, RGB: turned by its EXIF orientation, transparency over white, 16 bits to 8.

    Of an animation it is the first frame, and `info["frames"]` says of how many. Raises OSError, ValueError or
    SyntaxError, Pillow's own, where `data` is not a whole image.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # The further pictures of a JPEG are a gain map, a depth or a thumbnail, not an animation.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            image.load()
            turned = _turned(image)
            if turned.mode == "I;16":  # Pillow clips it at 255 instead of scaling it
                turned = Image.fromarray((np.asarray(turned) / 257).round().astype(np.uint8))
            if turned.has_transparency_data:
                over = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
            decoded = turned.convert("RGB")
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"no image of a known format ({', '.join(FORMATS)})") from None
    decoded.info["frames"] = frames
    return decoded


def _turned(image: Image.Image) -> Image.Image:
    turn = None
    with suppress(Exception):  # a broken tag raises many kinds; the pixels are whole
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def pixels_digest(image: Image.Image) -> bytes:
    """8 bytes of the SHA-256 of size and pixels: equal for equal pictures, whatever the file format."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).digest()[:8]


def stored_pixels(image: Image.Image, *, px: int, channels: int) -> np.ndarray:
    """The central square, resized and then turned gray where asked: uint8, (px, px, channels)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.resize((px, px), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return np.asarray(square.convert("L" if channels == 1 else "RGB")).reshape(px, px, channels)


def encode_png(pixels: np.ndarray) -> bytes:
    """pixels: uint8, (h, w, 3) or (h, w, 1)."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG", compress_level=6)
    return file.getvalue()


class _WithoutMain(SpawnProcess):
    """Is given no main module to import: the parent's has imported torch or Ray, which takes seconds."""

    def start(self) -> None:
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Spawning(SpawnContext):
    Process = _WithoutMain


@contextmanager
def decoding_pool() -> Iterator[Executor]:
    """One process a usable CPU. Threads were tried: Pillow holds the interpreter too long at 32 px to gain from them."""
    with ProcessPoolExecutor(usable_cpus(), _Spawning(), initializer=_end_with_parent) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise StorageError(
                "a process that decodes images was killed, perhaps because memory ran out\n"
                "  do: run the same command again, with fewer CPUs (`taskset`) or more memory"
            ) from None


def in_order(pool: Executor, function: Callable[[S], T], items: Iterable[S], at_a_time: int = AT_A_TIME) -> Iterator[T]:
    """`function` of each item, by the pool's processes, in the order of the items, which are read a little ahead."""
    left, waiting = iter(items), deque[Future[list[T]]]()
    while chunk := list(islice(left, at_a_time)):
        waiting.append(pool.submit(list, map(function, chunk)))  # computed where it becomes a list
        if len(waiting) > AHEAD * usable_cpus():
            yield from waiting.popleft().result()
    for future in waiting:
        yield from future.result()


def _end_with_parent() -> None:
    """This process ends when its parent has; after a SIGKILL of the parent it would wait for work for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
