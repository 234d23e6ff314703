"""Images of odd modes and shapes, and files that are no images or mean harm."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from jaxlab.errors import UserError
from jaxlab.processing import pixels
from tests.processing.folders import CASES, GOLDEN, load_processor, write_folder

TOKENIZER = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))


def refusal(file):
    """The line with which a file is refused; empty where it is read."""
    try:
        pixels.read_image(file, True)
    except UserError as error:
        return str(error)
    return ""


def test_files_are_turned_upright_and_images_are_not(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert pixels.read_image(tmp_path / "turned.png", True).shape == (4, 2, 3)
    assert pixels.read_image(Image.open(tmp_path / "turned.png"), True).shape == (2, 4, 3)


def test_transparency(tmp_path):
    image = Image.new("RGBA", (2, 2), (200, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    assert pixels.read_image(image, True)[0, 0].tolist() == [255, 255, 255]
    assert pixels.read_image(tmp_path / "clear.png", True)[0, 0].tolist() == [200, 0, 0]


def test_other_modes_are_refused_where_the_processor_does_not_convert(tmp_path):
    folder = write_folder(tmp_path, "llava", preprocessor={"do_convert_rgb": False})
    with pytest.raises(UserError, match=r"the image is L, and the processor takes RGB only"):
        load_processor(folder)("", [Image.new("L", (20, 20))], TOKENIZER)
    load_processor(folder)("", [Image.new("RGB", (20, 20)), GOLDEN / "gray.png"], TOKENIZER)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp"])
def test_files_cut_off_anywhere(kind, tmp_path):
    Image.open(GOLDEN / "wide.png").convert("RGB").save(tmp_path / f"whole.{kind}")
    whole = (tmp_path / f"whole.{kind}").read_bytes()
    pixels.read_image(tmp_path / f"whole.{kind}", True)
    file = tmp_path / "cut"
    refused = 0
    for length in range(0, len(whole) - 40, max(1, len(whole) // 25)):
        file.write_bytes(whole[:length])
        refused += "not an image that can be read" in refusal(file)
    assert refused >= 20


def test_bytes_turned_over(tmp_path):
    rng = np.random.default_rng(0)
    whole = (GOLDEN / "turned.png").read_bytes()
    for _ in range(60):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            broken[place] ^= int(rng.integers(1, 256))
        (tmp_path / "broken.png").write_bytes(broken)
        message = refusal(tmp_path / "broken.png")
        assert not message or "not an image that can be read" in message


def png_of(width, height):
    """A PNG whose header promises that size, with next to no data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(100_000, 100_000), (10_000, 10_000), (0, 5), (5, 0), (2**31 - 1, 1)])
def test_files_that_promise_too_much_or_nothing(size, tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_of(*size))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        message = refusal(tmp_path / "bomb.png")
    assert "bomb.png: not an image that can be read" in message
    assert not seen


def test_what_is_no_image(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    # Pillow would start a program to read this.
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for name in ("text.png", "empty.png", "program.png"):
        with pytest.raises(UserError, match=f"{name}: not an image that can be read"):
            pixels.read_image(tmp_path / name, True)
    for name in ("absent.png", "."):
        with pytest.raises(UserError, match="no such image file"):
            pixels.read_image(tmp_path / name, True)
    with pytest.raises(UserError, match="holds no pixels, it is 0 by 3"):
        pixels.read_image(Image.new("RGB", (0, 3)), True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [(1, 1), (3, 30_000), (30_000, 3), (1, 60_000)])
def test_strange_shapes_fit_or_are_refused(name, size, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "MOST_PIXELS", 1 << 20)
    monkeypatch.setattr(pixels, "MOST_TILES", 300)
    changes = {"preprocessor": {"size": {"longest_edge": 200}}} if name == "idefics3" else {}
    processor = load_processor(write_folder(tmp_path, name, **changes), **CASES[name]["overrides"])
    try:
        images = processor("", [Image.new("RGB", size)], TOKENIZER)["images"]
    except UserError:
        images = None
    assert images is not None or max(size) > 1 or name == "idefics2_split"  # a quarter of 1 pixel
    assert images is None or (images.size < 1 << 21 and np.isfinite(images).all())


def test_a_refused_file_is_named(tmp_path):
    Image.new("RGB", (1, 300)).save(tmp_path / "thin.png")
    processor = load_processor(write_folder(tmp_path, "qwen2_vl"))
    with pytest.raises(UserError, match=r"thin\.png: 1 by 300 pixels are longer than 200 times"):
        processor("", [GOLDEN / "wide.png", tmp_path / "thin.png"], TOKENIZER)


def test_images_of_different_sizes_do_not_make_a_batch(tmp_path):
    changes = {"do_center_crop": False, "size": {"shortest_edge": 10}}
    processor = load_processor(write_folder(tmp_path, "llava", preprocessor=changes))
    with pytest.raises(UserError, match="different sizes"):
        processor("", [GOLDEN / "wide.png", GOLDEN / "gray.png"], TOKENIZER)


def test_an_image_that_is_not_resized_has_to_fit(tmp_path):
    processor = load_processor(write_folder(tmp_path, "qwen2_vl", preprocessor={"do_resize": False}))
    assert processor("", [GOLDEN / "gray.png"], TOKENIZER)["image_grid_thw"].tolist() == [[1, 10, 10]]
    with pytest.raises(UserError, match="67 by 24 pixels are not made of tokens of 8 by 8"):
        processor("", [GOLDEN / "wide.png"], TOKENIZER)
