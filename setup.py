"""Entry point for tools that still ask for a setup.py; every piece of metadata is in pyproject.toml."""

from setuptools import setup

setup()
