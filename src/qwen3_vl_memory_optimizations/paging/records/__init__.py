"""What the Pager knows of each tensor and page."""
