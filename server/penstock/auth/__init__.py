"""Who may ask for what: API keys, and the groups of methods that a header restricts, for all doors."""

from penstock.auth.guard import GRPC, HTTP, Category, Find, Guard, make_guard
from penstock.auth.keys import Keys

__all__ = ["GRPC", "HTTP", "Category", "Find", "Guard", "Keys", "make_guard"]
