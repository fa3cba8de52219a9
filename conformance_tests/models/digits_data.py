"""scikit-learn's handwritten digits, 1797 images of 8x8, in the two parts that `digits` is trained and judged on."""

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

Images = npt.NDArray[np.float32]  # [n,1,8,8], ink from 0 to 16
Labels = npt.NDArray[np.int64]  # [n], 0 to 9


def training() -> tuple[Images, Labels]:
    """The images that are not held out, in the data set's order."""
    return _part(held_out=False)


def held_out() -> tuple[Images, Labels]:
    """A fifth of each class, never seen in training, in the data set's order."""
    return _part(held_out=True)


def _part(held_out: bool) -> tuple[Images, Labels]:
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    chosen = np.zeros(len(labels), np.bool_)
    # RandomState's stream is frozen by NumPy; the splitters of scikit-learn may change from one release to another,
    # and a model that was committed would then be judged on images it was trained on.
    random = np.random.RandomState(0)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        chosen[random.permutation(members)[: len(members) // 5]] = True
    part = chosen if held_out else ~chosen
    return digits.images[part, None].astype(np.float32), labels[part]
