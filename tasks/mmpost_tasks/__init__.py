"""Tasks by name: data, prompt and rewards together.

Only names stand here; ``Catalog("tasks", TASKS).get(name)`` imports one.
"""

TASKS = {"demo_vqa": "mmpost_tasks.demo_vqa:TASK"}
