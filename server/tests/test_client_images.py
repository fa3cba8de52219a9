"""Image files and the layouts that shapes imply."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from penstock.client.images import Layout, arrange, layout
from penstock.client.transport import TensorInfo
from penstock.client.values import read
from penstock.errors import Kind, ServingError
from penstock.tensor import DATATYPES

HAS_PILLOW = importlib.util.find_spec("PIL") is not None


def info(*shape: int, datatype: str = "UINT8") -> TensorInfo:
    return TensorInfo("image", DATATYPES[datatype], shape)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ([-1, 3, 224, 224], Layout(3, 224, 224, 0)),
        ([1, 1, 28, 28], Layout(1, 28, 28, 0)),
        ([-1, 4, -1, -1], Layout(4, -1, -1, 0)),
        ([-1, 32, 48, 3], Layout(3, 32, 48, 2)),
        ([3, 8, 9], Layout(3, 8, 9, 0)),
        ([8, 9, 3], Layout(3, 8, 9, 2)),
        ([1, 8, 9], Layout(1, 8, 9, 0)),
        ([-1, 8, 9], Layout(1, 8, 9, None)),
        ([8, 9], Layout(1, 8, 9, None)),
    ],
)
def test_a_shape_says_where_channels_height_and_width_go(shape: list[int], expected: Layout) -> None:
    assert layout(info(*shape)) == expected


@pytest.mark.parametrize(
    "shape", [[], [16], [-1, 16, 8, 8], [-1, -1, -1, -1], [2, 3, 8, 8], [5, 8, 8], [1, 1, 3, 8, 8]]
)
def test_other_shapes_are_no_images(shape: list[int]) -> None:
    with pytest.raises(ServingError, match="does not say where an image's channels, height and width go"):
        layout(info(*shape))


def test_pixels_are_arranged_by_the_layout() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    first = arrange(info(3, 2, 3), Layout(3, 2, 3, 0), pixels, "x.png")
    assert first.shape == (3, 2, 3)
    assert first[:, 1, 2].tolist() == pixels[1, 2].tolist()
    assert arrange(info(2, 3, 3), Layout(3, -1, -1, 2), pixels, "x.png").tolist() == pixels.tolist()
    gray = pixels[:, :, 0]
    assert arrange(info(2, 3), Layout(1, 2, 3, None), gray, "x.png").tolist() == gray.tolist()
    assert arrange(info(1, 2, 3), Layout(1, 2, 3, 0), gray, "x.png").tolist() == [gray.tolist()]


def test_another_size_is_refused_with_both() -> None:
    with pytest.raises(ServingError) as caught:
        arrange(info(-1, 1, 8, -1), Layout(1, 8, -1, 0), np.zeros((480, 640), np.uint8), "cat.png")
    assert caught.value.message == (
        "input 'image' expects images of any x 8 pixels (width x height, shape [-1,1,8,-1]), "
        "got 'cat.png' of 640 x 480; resize it first"
    )


@pytest.mark.skipif(HAS_PILLOW, reason="only where Pillow is not installed")
def test_without_pillow_an_image_is_refused_with_what_to_install() -> None:
    with pytest.raises(ServingError) as caught:
        read(info(8, 8), "@digit.png", str)
    assert caught.value.kind is Kind.UNSUPPORTED
    assert caught.value.message == "input 'image': reading 'digit.png' needs Pillow: pip install pillow"


@pytest.mark.skipif(not HAS_PILLOW, reason="needs Pillow")
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ([-1, 3, 1, 2], [[[[255, 0]], [[0, 0]], [[0, 255]]]]),
        ([-1, -1, -1, 3], [[[[255, 0, 0], [0, 0, 255]]]]),
        ([-1, -1, 4], [[[255, 0, 0, 255], [0, 0, 255, 255]]]),
        ([-1, 1, 1, 2], [[[[76, 29]]]]),
        ([1, 2], [[76, 29]]),
    ],
)
def test_an_image_file_becomes_the_pixels_that_the_model_takes(
    tmp_path: Path, shape: list[int], expected: list[object]
) -> None:
    from PIL import Image

    path = tmp_path / "x.PNG"
    Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)).save(path)
    tensor = read(info(*shape, datatype="FP32"), f"@{path}", str)
    assert tensor.array.dtype == np.float32
    assert tensor.array.tolist() == expected


@pytest.mark.skipif(not HAS_PILLOW, reason="needs Pillow")
def test_deep_pixels_and_files_that_are_no_images_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    deep, text = tmp_path / "deep.png", tmp_path / "text.png"
    Image.fromarray(np.array([[70, 60000]], np.uint16)).save(deep)
    text.write_text("hello")
    with pytest.raises(ServingError, match="not of 8 bits; give them as a"):
        read(info(1, 2), f"@{deep}", str)
    with pytest.raises(ServingError, match="is no image that Pillow can read"):
        read(info(1, 2), f"@{text}", str)
