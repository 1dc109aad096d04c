"""Context-informed grounding supervision: the context stands before the response and does not train.

    L = -(1/N) sum over the response's tokens of log pi(y_t | instruction, context, y_<t)

Supervised fine-tuning with a context in each row. Where it stands in the user's message, nothing more is needed. Where
it is the first part of the assistant's message, mark that part: ``{"type": "text", "text": ..., "train": false}``; a
message as a whole is marked the same way.

Source: "Context-Informed Grounding Supervision", arXiv 2506.15480. There: LoRA, batch 128, 3 epochs, Llama-3.1-8B; it
compares with rows without a context and with contexts that train, which is the same data without the mark.
Differs: no context is looked up; rows bring their own.
"""

from mmpost.train.method import Method
from mmpost.train.parts import Parts


def preset() -> Method:
    """Parts of demonstrations."""
    return Method(demo=Parts(aggregate="token"))
