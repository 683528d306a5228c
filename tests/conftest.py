"""Settings for every test."""

import os

from hypothesis import settings

# Before torch is imported. The models are so small that a second thread only costs: 1 s against 30 s for a golden
# on a busy two-core machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shared machines stall at random, and a property that holds should hold in every run.
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")
