"""Weights by name, and what a policy computes with them."""

import logging

# Where bitsandbytes is installed, peft imports it, and it complains of an optional kernel before anyone asked for it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)
