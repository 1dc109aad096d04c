"""The one loss, what it is weighted by, and the loop that takes its steps."""
