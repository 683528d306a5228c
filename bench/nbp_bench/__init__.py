"""Sweeps, measures and gates engines against the reference."""
