"""Records of measurements, and what is written from them."""
