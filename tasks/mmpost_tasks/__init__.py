"""Tasks by name: data, prompt and rewards together.

Only names stand here; ``Catalog("tasks", TASKS).get(name)`` imports one.
"""

TASKS = {
    "demo_audio": "mmpost_tasks.demo_audio:TASK",
    "demo_vqa": "mmpost_tasks.demo_vqa:TASK",
    "demo_vqa_reading": "mmpost_tasks.demo_vqa:TASK_READING",
    "demo_video": "mmpost_tasks.demo_video:TASK",
    "demo_video_real": "mmpost_tasks.demo_video_real:TASK",
    "mix_digits": "mmpost_tasks.demo_mixture:DIGITS",
    "mix_shoes": "mmpost_tasks.demo_mixture:SHOES_TASK",
    "mix_tops": "mmpost_tasks.demo_mixture:TOPS_TASK",
}
