"""HTTP: OIP over JSON and binary tensors, health, metadata and the control methods."""

from penstock.http_api.app import HttpApp
from penstock.http_api.infer import Door, Exchange, Head, serve_infer
from penstock.http_api.metrics import MetricsApp
from penstock.http_api.server import make_server

__all__ = ["Door", "Exchange", "Head", "HttpApp", "MetricsApp", "make_server", "serve_infer"]
