"""Runtimes that come with Penstock; each is one module and one entry point."""
