"""The one place where the version is written; setup.py and both packages read it."""

__version__ = "0.1.0"
