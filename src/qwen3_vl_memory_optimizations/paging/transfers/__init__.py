"""Page transfers between the SSD and memory, and the choice of pages that stay."""
