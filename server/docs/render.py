"""Writes the tables of compatibility.md from the code: `python server/docs/render.py`, or `--check` to compare."""

import sys
from pathlib import Path

from penstock import model_config, triton_flags

PAGE = Path(__file__).with_name("compatibility.md")
TABLES = {"flags": triton_flags.markdown, "fields": model_config.markdown}


def rendered(text: str) -> str:
    """The page with each `<!-- begin NAME -->` … `<!-- end NAME -->` filled from the code."""
    for name, table in TABLES.items():
        before, begin, rest = text.partition(f"<!-- begin {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        if rendered(text) != text:
            print(f"{PAGE.name} is not current: run make docs", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(rendered(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
