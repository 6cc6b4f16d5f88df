"""What a run leaves: records in memory and on the disk."""
