"""Records of measurements, and the tables, figures and reports that show them."""
