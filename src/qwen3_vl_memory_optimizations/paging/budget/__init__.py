"""The budget: accounts, memory used by others, and memory returned to the system."""
