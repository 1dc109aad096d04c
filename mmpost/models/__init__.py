"""Weights by name, and what a policy computes with them."""
