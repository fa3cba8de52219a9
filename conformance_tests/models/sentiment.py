"""`sentiment`: tf-idf of words and a linear classifier; text in, numbers out."""

import numpy as np
from skl2onnx.common.data_types import StringTensorType
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from .graphs import Directory, Files
from .sentiment_corpus import NEGATIVE, POSITIVE
from .sklearn_export import export

CONFIG = """\
name: "sentiment"
platform: "onnxruntime_onnx"
max_batch_size: 64
input [ { name: "text" data_type: TYPE_STRING dims: [ 1 ] } ]
output [
  { name: "label" data_type: TYPE_INT64 dims: [ 1 ] reshape { shape: [ ] } },
  { name: "probabilities" data_type: TYPE_FP32 dims: [ 2 ] label_filename: "labels.txt" }
]
"""


def sentiment() -> tuple[Directory, float]:
    """BYTES text [N,1] → INT64 label [N] (0 negative, 1 positive) and FP32 probabilities [N,2].

    Also the accuracy on every fourth sentence of either kind, held out.
    """
    texts = np.array([*NEGATIVE, *POSITIVE])
    labels = np.repeat([0, 1], [len(NEGATIVE), len(POSITIVE)])
    unseen = np.concatenate([np.arange(len(NEGATIVE)), np.arange(len(POSITIVE))]) % 4 == 3
    # ONNX Runtime splits words by RE2, which does not know the \b of scikit-learn's default pattern.
    words = TfidfVectorizer(token_pattern="[a-zA-Z0-9_]+")
    pipeline = make_pipeline(words, LogisticRegression(C=10)).fit(texts[~unseen], labels[~unseen])
    model = export("sentiment", pipeline, "text", StringTensorType([None, 1]), zipmap=False)
    files: Files = {"1/model.onnx": model, "config.pbtxt": CONFIG, "labels.txt": "negative\npositive\n"}
    return Directory("sentiment", files), float(pipeline.score(texts[unseen], labels[unseen]))
