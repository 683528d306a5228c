"""The PyTorch implementation of Next-Block Prediction, which defines the correct result."""
