"""Timings against TRL. Nothing here is part of the package; run the scripts from a checkout."""
