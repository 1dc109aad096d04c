"""The few classes and functions that users import from ``mmpost``; the commands call the same ones."""
