"""Next-Block Prediction in PyTorch: the definition of correct."""
