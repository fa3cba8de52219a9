"""The options of `penstock infer`, and what it does."""

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from penstock.client import access
from penstock.errors import Kind, ServingError
from penstock.settings import Settings

if TYPE_CHECKING:
    from penstock.client.transport import Metadata, Transport
    from penstock.messages import InferRequest, Sequence

DESCRIPTION = """\
Send one request and print the answer. Values are typed by the model's metadata:

  x=[[1,2],[3,4]]  x=0.5  x=true     JSON
  text=hello  text='"[a]"'           one string as it stands, or as JSON
  x=@values.npy                      a NumPy file, refused where a value would change
  x=@picture.png                     pixels 0 to 255 in the model's layout (.png, .jpg; needs Pillow)
  x=@values.json  x=@-               JSON from a file, from standard input
  text=@letter.txt                   for a BYTES input: the content of a file as one element

A batch axis that a value lacks is added.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` what `run` reads."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="the model's name")
    parser.add_argument("values", nargs="*", metavar="NAME=VALUE", help="an input")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--url", default="http://127.0.0.1:8000", help="a server, over HTTP (default: %(default)s)", metavar="URL"
    )
    target.add_argument("--grpc", help="a server, over gRPC", metavar="HOST:PORT")
    target.add_argument("--local", help="a model file, a model's directory or a repository; no server", metavar="PATH")
    access.add_options(parser)
    # Not `version` and `id`: those are the program's and the server's.
    parser.add_argument("--version", dest="model_version", default="", help="of the model", metavar="N")
    parser.add_argument("--id", dest="request_id", default="", help="the request's id", metavar="ID")
    parser.add_argument(
        "--output", action="append", default=[], help="ask for this output alone; may be repeated", metavar="NAME"
    )
    parser.add_argument(
        "--classes", type=int, default=0, metavar="K",
        help="the K largest values with their labels: of the outputs that --output names, else of all FP32 and FP64",
    )  # fmt: skip
    parser.add_argument(
        "--sequence", help="the id of the request's sequence, a number or text, for models that have them", metavar="ID"
    )
    parser.add_argument("--start", action="store_true", help="it is the first request of its sequence")
    parser.add_argument("--end", action="store_true", help="it is the last request of its sequence")
    parser.add_argument("--json", action="store_true", help="print the answer in the protocol's JSON")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Ask, and print the answer. `settings` are for --local. Raises ServingError."""
    if arguments.classes < 0:
        raise ServingError(Kind.INVALID, f"--classes expects a positive number, got {arguments.classes}")
    transport = _open(arguments, settings)
    try:
        request = _request(arguments, transport.metadata(arguments.model, arguments.model_version))
        response = transport.infer(request)
    finally:
        transport.close()
    from penstock.client import printing

    if arguments.json:
        sys.stdout.write(printing.as_json(response))
    else:
        classified = {name for name, output in request.outputs.items() if output.classification}
        sys.stdout.write(printing.as_text(response, classified))
    return 0


def _open(arguments: argparse.Namespace, settings: Settings) -> "Transport":
    # Each brings its libraries, of which the others need none.
    if arguments.local:
        if option := access.given(arguments):
            raise ServingError(Kind.INVALID, f"{option} needs a server: with --local there is none")
        from penstock.client.local import Local

        return Local(arguments.model, arguments.local, settings)
    if arguments.grpc:
        from penstock.client.over_grpc import Grpc

        return Grpc(arguments.grpc, access.headers(arguments))
    from penstock.client.over_http import Http

    return Http(arguments.url, access.headers(arguments))


def _request(arguments: argparse.Namespace, metadata: "Metadata") -> "InferRequest":
    from penstock.client import values
    from penstock.messages import InferRequest, RequestedOutput

    texts: dict[str, str] = {}
    for argument in arguments.values:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ServingError(Kind.INVALID, f"expected NAME=VALUE, got '{argument}'")
        if name in texts:
            raise ServingError(Kind.INVALID, f"input '{name}' is given twice")
        if name not in metadata.inputs:
            raise _unknown("input", name, arguments.model, metadata.inputs)
        texts[name] = text
    if sum(text == "@-" for text in texts.values()) > 1:
        raise ServingError(Kind.INVALID, "only one input can come from standard input")
    inputs = {name: values.read(metadata.inputs[name], text, sys.stdin.read) for name, text in texts.items()}
    for name in arguments.output:
        if name not in metadata.outputs:
            raise _unknown("output", name, arguments.model, metadata.outputs)
    outputs = {name: RequestedOutput(name, arguments.classes) for name in arguments.output}
    if arguments.classes and not outputs:
        outputs = {
            name: RequestedOutput(name, arguments.classes if info.datatype.name in ("FP32", "FP64") else 0)
            for name, info in metadata.outputs.items()
        }
        if not any(output.classification for output in outputs.values()):
            raise ServingError(
                Kind.INVALID, f"no output of model '{arguments.model}' is FP32 or FP64; name one with --output"
            )
    return InferRequest(
        arguments.model,
        arguments.model_version,
        arguments.request_id,
        inputs,
        outputs,
        sequence=_sequence(arguments.sequence, arguments.start, arguments.end),
    )


def _sequence(id: str | None, start: bool, end: bool) -> "Sequence | None":
    from penstock.messages import Sequence

    if id is None:
        if start or end:
            raise ServingError(Kind.INVALID, "--start and --end need --sequence ID")
        return None
    return Sequence(int(id) if id.isdecimal() else id, start, end)


def _unknown(what: str, name: str, model: str, known: Iterable[str]) -> ServingError:
    return ServingError(Kind.INVALID, f"model '{model}' has no {what} '{name}'; its {what}s are: {', '.join(known)}")
