"""One file per method: what it keeps, divides by and credits."""

# Preset name to the function that says its terms and the object with its default parts.
ALGOS = {
    "sft": "mmpost.algos.sft:SFT",
    "grpo": "mmpost.algos.grpo:GRPO",
}
