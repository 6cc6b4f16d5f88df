"""Replace forwards of decoder layers and of the vision tower, and estimate the memory they need."""
