import io
import os
import signal
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from imgcls.cpus import usable_cpus
from imgcls.data.images import decode, decoding_pool, encode_png, pixels_digest, stored_pixels
from imgcls.errors import StorageError
from tests.conftest import ROOT, image


def data_of(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_the_exif_orientation_is_applied():
    picture = image(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    turned = decode(data_of(picture, "PNG", exif=exif))
    assert turned.size == (picture.height, picture.width)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(picture), -1))


def test_transparency_lies_over_white():
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(decode(data_of(picture, "PNG"))).min() == 255


def test_a_palette_image_is_decoded_to_its_colours():
    picture = Image.new("P", (3, 3), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    assert np.asarray(decode(data_of(picture, "PNG")))[0, 0].tolist() == [10, 200, 30]


def test_sixteen_bits_are_scaled_not_clipped():
    wide = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(decode(data_of(wide, "PNG")))[0, :, 0].tolist() == [0, 128, 255]
    dark = Image.fromarray(np.array([[0, 200, 255]], dtype=np.uint16))
    assert np.asarray(decode(data_of(dark, "PNG")))[0, :, 0].tolist() == [0, 1, 1]


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "LA"])
def test_every_mode_becomes_rgb(mode: str):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode(data_of(image(2, mode=mode), kind)).mode == "RGB"


def test_equal_pictures_have_equal_digests_whatever_their_format():
    picture = image(3)
    formats = [data_of(picture, "PNG"), data_of(picture, "BMP"), data_of(picture, "WEBP", lossless=True)]
    assert len({pixels_digest(decode(data)) for data in formats}) == 1
    assert pixels_digest(picture) != pixels_digest(image(4))


def test_a_picture_and_its_reshaped_bytes_differ():
    tall, wide = Image.new("RGB", (2, 8)), Image.new("RGB", (8, 2))
    assert pixels_digest(tall) != pixels_digest(wide)


def test_stored_pixels_are_the_central_square():
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200
    assert (stored_pixels(Image.fromarray(pixels), px=10, channels=3) == 200).all()


@pytest.mark.parametrize("size", [(16, 17), (17, 16), (16, 16)])
def test_an_image_of_the_stored_size_keeps_its_pixels_where_one_side_is_a_pixel_longer(size: tuple[int, int]):
    picture = image(6, size)
    assert np.array_equal(stored_pixels(picture, px=16, channels=3), np.asarray(picture)[:16, :16])


def test_gray_is_luminance():
    pixels = np.full((6, 6, 3), (255, 0, 0), dtype=np.uint8)
    assert stored_pixels(Image.fromarray(pixels), px=6, channels=1)[0, 0, 0] == round(255 * 0.299)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels: int):
    pixels = stored_pixels(image(5), px=16, channels=channels)
    again = np.asarray(Image.open(io.BytesIO(encode_png(pixels)))).reshape(pixels.shape)
    assert np.array_equal(again, pixels)


def test_a_broken_exif_tag_costs_no_image_and_the_orientation_is_read_beside_it():
    tags = struct.pack("<HHLL", 0x0112, 3, 1, 6) + struct.pack("<HHLL", 0x011A, 10, 1, 38)
    rational = struct.pack("<LL", 0xFFFFFFFF, 1)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + bytes(4)
    for data in (exif + rational, exif + struct.pack("<LL", 0xFFFFFFFF, 0), exif + struct.pack("<ll", -7, 1)):
        assert decode(data_of(image(1), "JPEG", exif=data)).size == (30, 40)
    for data in (b"Exif\0\0nonsense", exif[:20], b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert decode(data_of(image(1), "JPEG", exif=data)).size == (40, 30)


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF", "JPEG2000", "ICO", "PPM", "TGA"])
def test_no_other_format_is_opened_whatever_the_file_is_called(kind: str):
    with pytest.raises(UnidentifiedImageError, match="no image of a known format"):
        decode(data_of(image(1), kind))


def test_of_an_animation_the_first_frame_is_taken_and_it_is_said_how_many_there_are():
    frames = [image(i) for i in (1, 2, 3)]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        decoded = decode(data_of(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        assert pixels_digest(decoded) == pixels_digest(frames[0])
        assert decoded.info["frames"] == 3
    assert decode(data_of(frames[0], "PNG")).info["frames"] == 1


def test_of_a_cameras_multi_picture_file_the_photograph_is_taken():
    decoded = decode(data_of(image(1), "MPO", save_all=True, append_images=[image(2)]))
    assert pixels_digest(decoded) == pixels_digest(decode(data_of(image(1), "JPEG")))
    assert decoded.info["frames"] == 1


def test_a_large_image_is_decoded_in_silence_and_one_beyond_bounds_is_refused(monkeypatch: pytest.MonkeyPatch):
    data = data_of(image(1), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings(action="error"):
        assert decode(data).size == (40, 30)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
        with pytest.raises(Image.DecompressionBombError, match="1200 pixels"):
            decode(data)


def test_a_pool_whose_process_was_killed_is_told_so():
    with pytest.raises(StorageError, match="a process that decodes images was killed"), decoding_pool() as pool:
        pool.submit(os._exit, 1).result()


def test_a_pool_is_gone_soon_after_its_parent_was_killed():
    works = "with decoding_pool() as pool: print(pool.submit(abs, 1).result(), flush=True); input()"
    command = [sys.executable, "-c", f"from imgcls.data.images import decoding_pool\n{works}"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"1\n"
        parent.send_signal(signal.SIGKILL)
        assert parent.communicate(timeout=20)[0] == b""  # ends where no process holds the pipe


def test_processes_that_decode_do_not_import_the_main_module_again(tmp_path: Path):
    main = tmp_path / "main.py"
    main.write_text(
        "print('imported')\n"
        "from imgcls.data.images import decoding_pool\n"
        "if __name__ == '__main__':\n"
        "    with decoding_pool() as pool:\n"
        "        print(*pool.map(abs, [1, 2, 3]))\n"
    )
    done = subprocess.run([sys.executable, str(main)], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (done.stdout, done.stderr) == (b"imported\n1 2 3\n", b"")


@pytest.mark.parametrize("line", [b"nonsense\n0::/caf\xe9\n", b"\n1:name=x\n0::/caf\xe9\n"])
def test_a_group_of_processes_by_an_odd_name_has_its_quota_too(tmp_path: Path, line: bytes):
    group = os.fsencode(tmp_path) + b"/sys/fs/cgroup/caf\xe9"
    os.makedirs(group)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_bytes(line)
    with open(group + b"/cpu.max", "w") as file:
        file.write("50000 100000")
    assert usable_cpus(tmp_path) == 1
