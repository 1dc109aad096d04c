"""Tasks by name: data, prompt and rewards together.

Only names stand here; ``Catalog("tasks", TASKS).get(name)`` imports one.
"""

TASKS = {
    "demo_vqa": "mmpost_tasks.demo_vqa:TASK",
    "mix_digits": "mmpost_tasks.demo_mixture:DIGITS",
    "mix_shoes": "mmpost_tasks.demo_mixture:SHOES_TASK",
    "mix_tops": "mmpost_tasks.demo_mixture:TOPS_TASK",
}
