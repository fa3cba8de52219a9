"""Modules that handler files import by their path."""
