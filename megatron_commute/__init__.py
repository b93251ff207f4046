"""Decide when each data domain is used while a language model is pretrained."""

__version__ = "0.2.0"
