"""The `penstock` command."""

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path

import penstock
from penstock import settings as options
from penstock.errors import Kind, ServingError
from penstock.settings import OPTIONS, Option, Settings

USAGE = 2  # the exit status of a command line that cannot be understood
BLAS_THREADS = "OPENBLAS_NUM_THREADS"  # which OpenBLAS reads when it is loaded
# The options that say how a model is loaded, for the commands that load one without a server.
LOADING = ("model_config_name", "default_max_batch_size", "device", "backend_config", "disable_auto_complete_config")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 failed, 2 not understood."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(next((argument for argument in given if not argument.startswith("-")), ""))
    if not given:
        parser.print_help()
        return USAGE
    known, unknown = parser.parse_known_args(_join_values(given))
    for argument in unknown:
        if known.operands and not argument.startswith("-"):
            getattr(known, known.operands).append(argument)  # argparse ends a list of operands at the first option
            continue
        if argument.startswith("-"):
            print(f"penstock: {_unknown_flag(argument.split('=')[0])}", file=sys.stderr)
        else:
            print(f"penstock: unexpected argument '{argument}'", file=sys.stderr)
        return USAGE
    command: Callable[[argparse.Namespace], int] = known.command
    try:
        return command(known)
    except ServingError as error:
        print(f"penstock: {error.message.strip()}", file=sys.stderr)
        return 1


def _serve(arguments: argparse.Namespace) -> int:
    try:
        settings = _settings(arguments, arguments.paths)
    except ServingError as error:
        print(f"penstock serve: {error.message}", file=sys.stderr)
        return USAGE
    gc.disable()  # until the server serves: imports make much to look at, and little that may go
    with one_blas_thread():
        from penstock import serve  # numpy, uvicorn and the rest, which --help does without
    return serve.run(settings)


@contextlib.contextmanager
def one_blas_thread(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """While NumPy is imported, unless the environment says otherwise.

    Its BLAS starts a thread for each further core, and each looks for work without rest for 0.1 s. The server has
    none: it multiplies no matrices. Handlers may, in processes of their own, and find the environment as it was.
    """
    if BLAS_THREADS in environment:
        yield
        return
    environment[BLAS_THREADS] = "1"
    try:
        yield
    finally:
        del environment[BLAS_THREADS]


def _settings(arguments: argparse.Namespace, repositories: Sequence[str] = ()) -> Settings:
    """From flags, environment and file. Raises ServingError."""
    flags = {name: value for name, value in vars(arguments).items() if name in OPTIONS and value is not None}
    for name, value in flags.items():
        if OPTIONS[name].repeated:
            flags[name] = tuple(value)
    if repositories:
        flags["model_repository"] = (*repositories, *flags.get("model_repository", ()))
    return options.from_sources(flags, file=Path(arguments.config) if arguments.config else None)


def _parser(wanted: str) -> argparse.ArgumentParser:
    """Of the commands only the one that is `wanted` gets its options: each imports something."""
    parser = argparse.ArgumentParser(prog="penstock", description=penstock.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"penstock {penstock.__version__}")
    parser.set_defaults(operands="")  # where a command keeps a list of operands, the name of that list
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (summary, add) in COMMANDS.items():
        command = commands.add_parser(name, allow_abbrev=False, help=summary)
        if name == wanted:
            add(command)
    return parser


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    from penstock import inspection

    inspection.add_options(parser)
    parser.set_defaults(command=lambda arguments: inspection.run(arguments, _settings(arguments)))
    _add_loading(parser, ("model_repository", *LOADING))


def _add_infer(parser: argparse.ArgumentParser) -> None:
    from penstock import client

    def infer(arguments: argparse.Namespace) -> int:
        given = [name for name in (*LOADING, "config") if getattr(arguments, name) is not None]
        if given and not arguments.local:
            flag = f"--{given[0].replace('_', '-')}"
            raise ServingError(Kind.INVALID, f"{flag} needs --local: it says how a model is loaded")
        return client.run(arguments, _settings(arguments))

    client.add_options(parser)
    parser.set_defaults(command=infer, operands="values")
    _add_loading(parser, LOADING)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from penstock import bench

    bench.add_options(parser)
    parser.set_defaults(command=lambda arguments: bench.run(arguments, _settings(arguments)))
    _add_loading(parser, LOADING)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    from penstock import doctor

    doctor.add_options(parser)
    parser.set_defaults(command=lambda arguments: doctor.run(arguments, _settings(arguments)))
    _add_loading(parser, ("device",))


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    from penstock.client import jobs_command

    jobs_command.add_options(parser)
    parser.set_defaults(command=jobs_command.run)


def _add_keys(parser: argparse.ArgumentParser) -> None:
    from penstock import keys_command

    keys_command.add_options(parser)
    parser.set_defaults(command=lambda arguments: keys_command.run(arguments, _settings(arguments)))


def _add_loading(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    group = parser.add_argument_group("loading")
    for name in names:
        _add_option(group, OPTIONS[name])
    group.add_argument("--config", metavar="FILE", help="read options from a TOML file")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_serve, operands="paths")
    parser.description = "Serve models over the Open Inference Protocol, HTTP and gRPC."
    parser.epilog = (
        "Each option is also an environment variable (--http-port: PENSTOCK_HTTP_PORT) and a TOML key "
        "(http_port); PENSTOCK_CONFIG names the file. Of flag, variable and file, the first that names an option "
        "decides it."
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH",
        help="a model file, a folder of model files, or a model repository; the same as --model-repository",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="read options from a TOML file")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in OPTIONS.values():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add_option(groups[option.group], option)


def _add_option(group: "argparse._ArgumentGroup", option: Option) -> None:
    flags = [option.flag, *("--" + alias.replace("_", "-") for alias in option.aliases)]
    default = "" if option.default in ("", ()) else f" (default: {str(option.default).lower()})"
    chosen = "{" + ",".join(filter(None, option.choices)) + "}" if option.choices else ""
    group.add_argument(
        *flags,
        dest=option.name,
        action="append" if option.repeated else "store",
        type=_typed(option),
        metavar=option.metavar or chosen or ("BOOL" if option.type is bool else option.type.__name__.upper()),
        help=(option.help + default).replace("%", "%%"),
    )


def _typed(option: Option) -> Callable[[str], object]:
    def parse(text: str) -> object:
        try:
            return option.parse(text, option.flag)
        except ServingError as error:
            raise argparse.ArgumentTypeError(error.message) from None

    return parse


_BARE = {option.flag: option.switch for option in OPTIONS.values() if option.type is bool or option.switch}


def _join_values(arguments: list[str]) -> list[str]:
    """Let switches stand alone: `--strict-readiness`, `--strict-readiness false` and `=false` all parse."""
    joined: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument in _BARE:
            following = arguments[position].lower() if position < len(arguments) else ""
            if following in options.BOOLS or (_BARE[argument] and following.isdecimal()):
                argument += f"={following}"
                position += 1
            else:
                argument += "=true"
        joined.append(argument)
    return joined


def _unknown_flag(flag: str) -> str:
    from penstock import triton_flags  # which only a mistake needs

    row = triton_flags.FLAGS.get(flag.removeprefix("--"))
    if row is not None and row.penstock is None:
        state = "does not have yet" if row.planned else "does not have"
        return f"{flag} is a flag of Triton's that Penstock {state}: {row.note}"
    return f"unknown flag {flag}{options.nearest(flag.removeprefix('--'), '--', dashes=True)}"


# By name: what `penstock --help` says of it, and what gives its parser options.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "serve": ("serve models over HTTP and gRPC", _add_serve),
    "inspect": ("show what the server would make of a model, and why", _add_inspect),
    "infer": ("send a request and print the answer", _add_infer),
    "bench": ("measure a model under load", _add_bench),
    "doctor": ("tell what this machine can serve on, and why not", _add_doctor),
    "jobs": ("hand in, list, watch and end jobs of a server", _add_jobs),
    "keys": ("add, list and remove the API keys of a server", _add_keys),
}


if __name__ == "__main__":
    sys.exit(main())
