"""Decode one media reference, or raise a typed error that names the row. Nothing is downloaded here."""
