"""The `penstock` command."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import penstock
from penstock import bench, client, doctor, inspection, keys_command, triton_flags
from penstock import settings as options
from penstock.client import jobs_command
from penstock.errors import Kind, ServingError
from penstock.settings import OPTIONS, Option, Settings

USAGE = 2  # the exit status of a command line that cannot be understood
# The options that say how a model is loaded, for the commands that load one without a server.
LOADING = ("model_config_name", "default_max_batch_size", "device", "backend_config", "disable_auto_complete_config")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 failed, 2 not understood."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
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
    from penstock import serve  # numpy, uvicorn and the rest, which --help does without

    return serve.run(settings)


def _inspect(arguments: argparse.Namespace) -> int:
    return inspection.run(arguments, _settings(arguments))


def _infer(arguments: argparse.Namespace) -> int:
    given = [name for name in (*LOADING, "config") if getattr(arguments, name) is not None]
    if given and not arguments.local:
        raise ServingError(Kind.INVALID, f"--{given[0].replace('_', '-')} needs --local: it says how a model is loaded")
    return client.run(arguments, _settings(arguments))


def _bench(arguments: argparse.Namespace) -> int:
    return bench.run(arguments, _settings(arguments))


def _keys(arguments: argparse.Namespace) -> int:
    return keys_command.run(arguments, _settings(arguments))


def _doctor(arguments: argparse.Namespace) -> int:
    return doctor.run(arguments, _settings(arguments))


def _settings(arguments: argparse.Namespace, repositories: Sequence[str] = ()) -> Settings:
    """From flags, environment and file. Raises ServingError."""
    flags = {name: value for name, value in vars(arguments).items() if name in OPTIONS and value is not None}
    for name, value in flags.items():
        if OPTIONS[name].repeated:
            flags[name] = tuple(value)
    if repositories:
        flags["model_repository"] = (*repositories, *flags.get("model_repository", ()))
    return options.from_sources(flags, file=Path(arguments.config) if arguments.config else None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="penstock", description=penstock.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"penstock {penstock.__version__}")
    parser.set_defaults(operands="")  # where a command keeps a list of operands, the name of that list
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_serve(commands.add_parser(
        "serve", allow_abbrev=False, help="serve models over HTTP and gRPC",
        description="Serve models over the Open Inference Protocol, HTTP and gRPC.",
        epilog="Each option is also an environment variable (--http-port: PENSTOCK_HTTP_PORT) and a TOML key "
        "(http_port); PENSTOCK_CONFIG names the file. Of flag, variable and file, the first that names an option "
        "decides it.",
    ))  # fmt: skip
    inspect = commands.add_parser(
        "inspect", allow_abbrev=False, help="show what the server would make of a model, and why"
    )
    inspection.add_options(inspect)
    inspect.set_defaults(command=_inspect)
    _add_loading(inspect, ("model_repository", *LOADING))
    infer = commands.add_parser("infer", allow_abbrev=False, help="send a request and print the answer")
    client.add_options(infer)
    infer.set_defaults(command=_infer, operands="values")
    _add_loading(infer, LOADING)
    load = commands.add_parser("bench", allow_abbrev=False, help="measure a model under load")
    bench.add_options(load)
    load.set_defaults(command=_bench, operands="")
    _add_loading(load, LOADING)
    check = commands.add_parser("doctor", allow_abbrev=False, help="tell what this machine can serve on, and why not")
    doctor.add_options(check)
    check.set_defaults(command=_doctor)
    _add_loading(check, ("device",))
    jobs = commands.add_parser("jobs", allow_abbrev=False, help="hand in, list, watch and end jobs of a server")
    jobs_command.add_options(jobs)
    jobs.set_defaults(command=jobs_command.run)
    keys = commands.add_parser("keys", allow_abbrev=False, help="add, list and remove the API keys of a server")
    keys_command.add_options(keys)
    keys.set_defaults(command=_keys)
    return parser


def _add_loading(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    group = parser.add_argument_group("loading")
    for name in names:
        _add_option(group, OPTIONS[name])
    group.add_argument("--config", metavar="FILE", help="read options from a TOML file")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_serve, operands="paths")
    parser.add_argument(
        "paths", nargs="*", metavar="PATH",
        help="a model file, a folder of model files, or a model repository; the same as --model-repository",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="read options from a TOML file")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in OPTIONS.values():
        group = groups.setdefault(option.group, parser.add_argument_group(option.group))
        _add_option(group, option)


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
    row = triton_flags.FLAGS.get(flag.removeprefix("--"))
    if row is not None and row.penstock is None:
        state = "does not have yet" if row.planned else "does not have"
        return f"{flag} is a flag of Triton's that Penstock {state}: {row.note}"
    return f"unknown flag {flag}{options.nearest(flag.removeprefix('--'), '--', dashes=True)}"


if __name__ == "__main__":
    sys.exit(main())
