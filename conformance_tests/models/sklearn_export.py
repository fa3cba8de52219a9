"""scikit-learn pipelines as ONNX models, stamped as ours."""

from onnx import ModelProto, helper
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import DataType
from sklearn.pipeline import Pipeline

from .graphs import IR_VERSION, OPSET


def export(name: str, pipeline: Pipeline, input_name: str, input_type: DataType, zipmap: bool) -> ModelProto:
    """A fitted classifier with the names that skl2onnx gives: output_label [N] and output_probability, a sequence
    of N maps, with `zipmap`; label [N] and probabilities [N,classes] without. The input's first axis is N as well.
    """
    model: ModelProto = convert_sklearn(
        pipeline,
        name,
        [(input_name, input_type)],
        target_opset={"": OPSET, "ai.onnx.ml": 3},
        options={id(pipeline): {"zipmap": zipmap}},
    )
    # skl2onnx takes no symbolic names.
    for value in (*model.graph.input, *model.graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.dim[0].dim_param = "N"
    # The operator's default is en_US, which a slim container lacks: there the model would not load. C lowers ASCII.
    for step in model.graph.node:
        if step.op_type == "StringNormalizer":
            step.attribute.append(helper.make_attribute("locale", "C"))
    model.producer_name, model.producer_version, model.domain = "penstock", "", ""
    model.ir_version = IR_VERSION
    return model
