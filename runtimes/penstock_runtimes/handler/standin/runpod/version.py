"""The version that error reports carry."""

__version__ = "0+penstock"
