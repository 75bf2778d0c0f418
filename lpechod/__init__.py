"""lpechod: a hardened TCP responder that echoes length-prefixed frames."""

__version__ = "0.1.0"
