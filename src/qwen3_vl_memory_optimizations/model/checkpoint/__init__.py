"""From a checkpoint to managed weights: which formats are read, what is packed, what is loaded, what is saved."""
