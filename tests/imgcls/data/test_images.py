import io

import numpy as np
import pytest
from PIL import Image

from imgcls.data.images import decode, encode_png, pixels_digest, stored_pixels
from tests.conftest import image


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


def test_gray_is_luminance():
    pixels = np.full((6, 6, 3), (255, 0, 0), dtype=np.uint8)
    assert stored_pixels(Image.fromarray(pixels), px=6, channels=1)[0, 0, 0] == round(255 * 0.299)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels: int):
    pixels = stored_pixels(image(5), px=16, channels=channels)
    again = np.asarray(Image.open(io.BytesIO(encode_png(pixels)))).reshape(pixels.shape)
    assert np.array_equal(again, pixels)
