"""`penstock keys`: the API keys that a server knows, added, listed and removed."""

import argparse
from pathlib import Path

from penstock.errors import Kind, ServingError
from penstock.settings import OPTIONS, Settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` what `run` reads."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    add = actions.add_parser(
        "add", allow_abbrev=False, help="make a key and print it, which no later command can do",
        description="Make a key. It is printed on the last line, once: the file holds only its hash. "
        "A server that uses the file knows the key within a second.",
    )  # fmt: skip
    add.set_defaults(action=_add)
    add.add_argument("--name", required=True, metavar="NAME", help="whose key it is, for messages and `remove`")
    add.add_argument("--scopes", required=True, metavar="SCOPE,...", help="what it is for: infer, jobs, admin, metrics")
    add.add_argument("--rate", type=int, default=0, metavar="N", help="at most so many requests per second")
    listing = actions.add_parser("list", allow_abbrev=False, help="show what each key is for, and never the key")
    listing.set_defaults(action=_list)
    remove = actions.add_parser(
        "remove", allow_abbrev=False, help="take a key out of the file; a server refuses it within a second"
    )
    remove.set_defaults(action=_remove)
    remove.add_argument("--name", required=True, metavar="NAME", help="the name that the key was added under")
    option = OPTIONS["api_keys"]
    for action in (add, listing, remove):
        action.add_argument(option.flag, dest=option.name, metavar=option.metavar, help="the file of keys")
        action.add_argument("--config", metavar="FILE", help="read options from a TOML file")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Do it to the file that the settings name. Raises ServingError."""
    if not settings.api_keys:
        raise ServingError(Kind.INVALID, "--api-keys must name the file of keys")
    arguments.action(Path(settings.api_keys), arguments)
    return 0


def _add(path: Path, arguments: argparse.Namespace) -> None:
    from penstock.auth import key_file

    key, text = key_file.make(arguments.name, arguments.scopes.split(","), arguments.rate)
    with key_file.edit(path) as keys:
        if any(known.name == key.name for known in keys):
            raise ServingError(Kind.EXISTS, f"'{path}' has a key '{key.name}' already")
        keys.append(key)
    print(f"Added '{key.name}' to {path}, for {', '.join(key.scopes)}. This is the key; it is not shown again:")
    print(text)


def _list(path: Path, _arguments: argparse.Namespace) -> None:
    from penstock.auth import key_file

    keys = key_file.read(path)
    rows = [
        ("NAME", "ID", "SCOPES", "RATE", "CREATED"),
        *((key.name, key.id, ",".join(key.scopes), str(key.rate or "-"), key.created) for key in keys),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _remove(path: Path, arguments: argparse.Namespace) -> None:
    from penstock.auth import key_file

    key_file.read(path)  # of a file that is not there, nothing can be removed
    with key_file.edit(path) as keys:
        left = [key for key in keys if key.name != arguments.name]
        if len(left) == len(keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise ServingError(Kind.NOT_FOUND, f"'{path}' has no key '{arguments.name}'; it has: {known}")
        keys[:] = left
    print(f"Removed '{arguments.name}' from {path}.")
