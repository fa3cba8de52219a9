"""Compile the .proto files beside this one into what the package carries.

`server/penstock/wire.binpb` holds their descriptors, and `server/penstock/wire_stubs/` types the messages that
`penstock.pb` builds from them. Both are committed. `python proto/compile.py` writes them; with `--check` it writes
nothing and exits with status 1 if they are not current.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).parent
PACKAGE = PROTO.parent / "server" / "penstock"
STUBS = "wire_stubs"
# protoc leaves `**kwargs` and `Mapping` bare, which strict checking refuses.
HEADER = "# Generated from proto/ by `make proto`.\n# mypy: ignore-errors\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile proto/ into server/penstock.")
    parser.add_argument("--check", action="store_true", help="fail if the committed files are not current")
    check = parser.parse_args().check
    fresh = compiled()
    committed = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.glob(f"{STUBS}/*")}
    stale = [name for name in fresh if not is_current(PACKAGE / name, fresh[name])] + sorted(committed.keys() - fresh)
    if check:
        for name in stale:
            print(f"server/penstock/{name} is not current: run `make proto`", file=sys.stderr)
        return 1 if stale else 0
    (PACKAGE / STUBS).mkdir(exist_ok=True)
    for name in stale:
        if name in fresh:
            (PACKAGE / name).write_bytes(fresh[name])
        else:
            committed[name].unlink()
        print(f"server/penstock/{name}")
    return 0


def compiled() -> dict[str, bytes]:
    """The content of every generated file, by its path below `PACKAGE`."""
    sources = sorted(path.name for path in PROTO.glob("*.proto"))
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        options = [f"--proto_path={PROTO}", "--include_imports", f"--descriptor_set_out={out / 'wire.binpb'}"]
        if protoc.main(["protoc", *options, f"--pyi_out={out}", *sources]) != 0:
            raise SystemExit("protoc failed")
        stubs = {f"{STUBS}/{path.name}": stub(path.read_text()) for path in sorted(out.glob("*.pyi"))}
        return {"wire.binpb": (out / "wire.binpb").read_bytes(), **stubs}


def stub(text: str) -> bytes:
    """Make protoc's imports relative, and drop the file descriptor, which `penstock.pb` does not show."""
    text = re.sub(r"^import (\w+_pb2) as", r"from . import \1 as", text, flags=re.MULTILINE)
    return (HEADER + re.sub(r"^DESCRIPTOR: .*\n\n?", "", text, flags=re.MULTILINE)).encode()


def is_current(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


if __name__ == "__main__":
    sys.exit(main())
