"""ModelInfer, and how the bytes of a message become a request. Protocol page gRPC, "ModelInfer"."""

from collections.abc import Callable

from penstock import pb
from penstock.access import new_id
from penstock.engine import OnLoop
from penstock.errors import Kind, ServingError
from penstock.grpc_api import templates, tensors
from penstock.grpc_api.bodies import Body
from penstock.grpc_api.calls import Call, Cancellable, Door, decoded
from penstock.messages import InferRequest, InferResponse
from penstock.model import Model


def infer(door: Door, body: Body, call: Call, reply: Callable[[InferResponse | ServingError], None]) -> Cancellable:
    """ModelInfer. Raises ServingError where the request is refused before it is queued."""
    model, request = admitted(door, body, call, decoupled=False)
    return door.engine.submit(model, request, OnLoop(door.mailbox, reply))


def admitted(door: Door, body: Body, call: Call, *, decoupled: bool) -> tuple[Model, InferRequest]:
    """The model that a message asks, which may be a decoupled one or not, and the request. Raises ServingError."""
    parts = templates.cut(body)
    known = door.templates.find(parts) if parts else None
    request = None
    if parts and known:
        model = door.engine.model(known.model, known.version)
        if model.signature is known.signature and (decoupled or not model.decoupled):
            request = known.fill(parts)
    if request is None:
        model, request = _parsed(door, body, decoupled)
        if parts:
            door.templates.learn(parts, request, model.signature)
    request.id = request.id or call.id
    if call.visit is not None:
        request.id = request.id or new_id()
        call.visit.model, call.visit.version, call.visit.id = model.name, model.version, request.id
    if door.forward.any:
        request.parameters.update(door.forward.chosen(call.metadata))
    request.deadline_ns = call.deadline_ns
    return model, request


def _parsed(door: Door, body: Body, decoupled: bool) -> tuple[Model, InferRequest]:
    message = decoded(pb.ModelInferRequest.FromString, body)
    model = door.engine.model(message.model_name, message.model_version)
    if model.decoupled and not decoupled:
        raise ServingError(Kind.UNSUPPORTED, "ModelInfer RPC doesn't support models with decoupled transaction policy")
    settings = door.engine.settings
    return model, tensors.decode(message, model.signature, settings.max_tensors, settings.max_rank)
