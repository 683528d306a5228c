"""The tests, one folder a package; a package itself so that they can share helpers and goldens."""
