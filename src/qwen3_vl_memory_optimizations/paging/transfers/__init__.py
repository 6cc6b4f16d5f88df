"""Moving pages between the SSD and memory, and choosing which stay."""
