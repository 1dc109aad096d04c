"""Accuracy with an interval on held-out rows."""
