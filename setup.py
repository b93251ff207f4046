"""Metadata is in pyproject.toml; here only the optional compiled part is declared."""

from setuptools import setup

setup()
