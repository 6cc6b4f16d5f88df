"""The budget: accounts, what others take of it, and memory that goes back."""
