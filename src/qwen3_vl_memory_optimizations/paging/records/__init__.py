"""The Pager's records of tensors and pages."""
