"""Exports a reference model, for one block shape, to a bundle of static graphs."""
