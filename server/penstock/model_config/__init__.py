"""Model configuration: `config.pbtxt` or JSON, its defaults and checks, and the frozen records the hot path reads.

A load takes the steps in this order: `read`, `identify`, `refuse_unsupported`, `validate`, the runtime's completion,
`normalise`, `validate` once more as complete, and then what reads it: `signature`, `batch_policy`, `sequence_policy`,
`instance_groups`.
Every step leaves its argument as it is.
"""

from penstock.model_config.checks import validate
from penstock.model_config.completion import ENSEMBLE, Choice, Note, identify, normalise, unheard
from penstock.model_config.padding import Cut, Padding, cuts, paddings
from penstock.model_config.reading import read, read_json, read_text, to_json, to_text
from penstock.model_config.records import (
    BatchPolicy,
    InstanceGroup,
    QueuePolicy,
    RateLimit,
    Resource,
    Signature,
    TensorSpec,
    batch_policy,
    instance_groups,
    signature,
    splits_oversized,
)
from penstock.model_config.sequences import (
    Control,
    SequencePolicy,
    State,
    controls,
    sequence_policy,
    sequence_tensors,
    states,
)
from penstock.model_config.support import FIELDS, Field, Support, markdown, refuse_unsupported

__all__ = [
    "ENSEMBLE",
    "FIELDS",
    "BatchPolicy",
    "Choice",
    "Control",
    "Cut",
    "Field",
    "InstanceGroup",
    "Note",
    "Padding",
    "QueuePolicy",
    "RateLimit",
    "Resource",
    "SequencePolicy",
    "Signature",
    "State",
    "Support",
    "TensorSpec",
    "batch_policy",
    "controls",
    "cuts",
    "identify",
    "instance_groups",
    "markdown",
    "normalise",
    "paddings",
    "read",
    "read_json",
    "read_text",
    "refuse_unsupported",
    "sequence_policy",
    "sequence_tensors",
    "signature",
    "splits_oversized",
    "states",
    "to_json",
    "to_text",
    "unheard",
    "validate",
]
