"""Image files → pixels in the layout that a model's shape implies. Pillow reads them, and is imported when it must."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from penstock.client.transport import TensorInfo
from penstock.errors import Kind, ServingError
from penstock.tensor import Array, show

SUFFIXES = (".png", ".jpg", ".jpeg")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # what converts to those without loss of depth


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model's input holds one image. A height or width of -1 is any."""

    channels: int
    height: int
    width: int
    channel_axis: int | None  # 0: CHW, 2: HWC, None: HW

    @property
    def mode(self) -> str:
        return MODES[self.channels]


def read(info: TensorInfo, path: Path) -> Array:
    """The image's pixels, 0 to 255, as uint8 without a batch axis; colours become gray and the like as the model wants.

    Nothing is scaled or resized. Raises ServingError: UNSUPPORTED where Pillow is not installed, INVALID for a shape
    that is no image's, and for another size than it says.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ServingError(
            Kind.UNSUPPORTED, f"input '{info.name}': reading '{path}' needs Pillow: pip install pillow"
        ) from error
    wanted = layout(info)
    try:
        with Image.open(path) as image:
            if image.mode not in EIGHT_BITS:
                raise ServingError(
                    Kind.INVALID,
                    f"input '{info.name}': '{path}' has pixels of mode {image.mode}, not of 8 bits; "
                    "give them as a .npy file",
                )
            pixels = np.asarray(image.convert(wanted.mode))
    except UnidentifiedImageError as error:
        raise ServingError(Kind.INVALID, f"input '{info.name}': '{path}' is no image that Pillow can read") from error
    return arrange(info, wanted, pixels, str(path))


def layout(info: TensorInfo) -> Layout:
    """What a shape says of images: [.., C, H, W], [.., H, W, C] or [.., H, W], after a batch axis or without one.

    Raises ServingError(INVALID) where it does not.
    """
    dims = info.shape
    for batch in (0, 1):
        rest = dims[batch:]
        if batch and dims[:1] not in ((-1,), (1,)):
            break
        if len(rest) == 3 and rest[0] in MODES:
            return Layout(rest[0], rest[1], rest[2], 0)
        if len(rest) == 3 and rest[2] in MODES:
            return Layout(rest[2], rest[0], rest[1], 2)
        if len(rest) == 2:
            return Layout(1, rest[0], rest[1], None)
    raise ServingError(
        Kind.INVALID,
        f"input '{info.name}': shape {show(dims)} does not say where an image's channels, height and width go; "
        "give the pixels as a .npy file",
    )


def arrange(info: TensorInfo, wanted: Layout, pixels: Array, source: str) -> Array:
    """Pixels [H, W] or [H, W, C] in the layout wanted. Raises ServingError(INVALID) for another size than it has."""
    height, width = pixels.shape[:2]
    if wanted.height not in (-1, height) or wanted.width not in (-1, width):
        expected = " x ".join("any" if size < 0 else str(size) for size in (wanted.width, wanted.height))
        raise ServingError(
            Kind.INVALID,
            f"input '{info.name}' expects images of {expected} pixels (width x height, shape {show(info.shape)}), "
            f"got '{source}' of {width} x {height}; resize it first",
        )
    if wanted.channel_axis is None:
        return pixels
    with_channels = pixels.reshape(height, width, wanted.channels)
    return with_channels.transpose(2, 0, 1) if wanted.channel_axis == 0 else with_channels
