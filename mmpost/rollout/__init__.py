"""Completions by the local model; engines behind the same call come beside it."""
