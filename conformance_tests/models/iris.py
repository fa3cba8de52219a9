"""`iris`: a scikit-learn pipeline as skl2onnx exports it by default, ZipMap included."""

from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .graphs import Directory
from .sklearn_export import export


def iris() -> tuple[Directory, float]:
    """FP32 measurements [N,4] in cm → INT64 output_label [N] and output_probability, N maps from class to FP32.

    Classes are 0 setosa, 1 versicolor, 2 virginica. Also the accuracy on a quarter of the flowers, held out.
    """
    flowers = load_iris()
    seen, unseen, seen_classes, unseen_classes = train_test_split(
        flowers.data, flowers.target, test_size=0.25, stratify=flowers.target, random_state=0
    )
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(seen, seen_classes)
    model = export("iris", pipeline, "measurements", FloatTensorType([None, 4]), zipmap=True)
    return Directory("iris", {"1/model.onnx": model}), float(pipeline.score(unseen, unseen_classes))
