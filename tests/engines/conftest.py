"""Exports are made once for the tests of engines too."""

from tests.export.conftest import exported

__all__ = ["exported"]
