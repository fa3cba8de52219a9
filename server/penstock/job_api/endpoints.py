"""Which models have a job door, and which words they may not be called by there. Protocol page jobs, section 7."""

import re

from penstock.http_api.app import WORDS

TENSORONE = frozenset({"endpoints", "jobs"})
KEPT = frozenset({"load", "docs", "openapi.json", "metrics", "auth"})  # for future use
RESERVED = WORDS | TENSORONE | KEPT
ID = re.compile(r"[A-Za-z0-9_.-]+")


def is_endpoint(name: str) -> bool:
    """Whether a model of this name can be an endpoint."""
    return name not in RESERVED and ID.fullmatch(name) is not None


def why_not(name: str) -> str:
    """Why a model of this name is no endpoint; "" if it is one."""
    if name in RESERVED:
        return f"'{name}' is a reserved word of the job API"
    return "" if ID.fullmatch(name) else "its name has characters other than letters, digits, '_', '.' and '-'"
