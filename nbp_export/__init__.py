"""Turns a reference model and a block shape into a bundle of static graphs."""
