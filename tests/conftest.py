"""For all tests: a slow machine is no failure of a property, so hypothesis sets no deadline per example."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
