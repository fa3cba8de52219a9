"""Checks a job's input against a schema."""

from __future__ import annotations

import json
from typing import Any


def validate(raw_input: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Check types and constraints, and put in defaults.

    `schema` gives for each key a dict: `type`, `required`, and where that is false `default`; `constraints`, if it is
    there, is a function that says whether a value is allowed.
    Returns {"validated_input": ...} or {"errors": [text, ...]}.
    """
    errors = [f"Unexpected input. {key} is not a valid input option." for key in raw_input if key not in schema]
    found = dict(raw_input)
    for key, given in schema.items():
        rules = given
        if not isinstance(given, dict):
            try:
                rules = json.loads(given)
            except (TypeError, ValueError):
                rules = None
        if not isinstance(rules, dict):
            errors.append(f"Schema error, {key} is not a dictionary.")
            continue
        if "type" not in rules:
            errors.append(f"Schema error, missing type for {key}.")
        if key not in found:
            if rules.get("required", True):
                errors.append(f"{key} is a required input.")
            elif "default" not in rules:
                errors.append(f"Schema error, missing default value for {key}.")
            else:
                found[key] = rules["default"]
        if key in found:
            errors += _complaints(key, found, rules)
    return {"errors": errors} if errors else {"validated_input": found}


def _complaints(key: str, found: dict[str, Any], rules: dict[str, Any]) -> list[str]:
    """What is wrong with one value. An integer where a float is wanted becomes one."""
    complaints = []
    kind = rules.get("type", object)
    if kind is float and type(found[key]) is int:
        found[key] = float(found[key])
    value = found[key]
    # A value of the default's own type is right, such as None beside `"default": None`.
    if not isinstance(value, kind) and not ("default" in rules and isinstance(value, type(rules["default"]))):
        complaints.append(f"{key} should be {kind} type, not {type(value)}.")
    if "constraints" in rules and not rules["constraints"](value):
        complaints.append(f"{key} does not meet the constraints.")
    return complaints
