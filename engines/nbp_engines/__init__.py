"""Opens and runs bundles: numpy and one runtime, no torch."""
