"""The tokenizer of the tiny models: trained on the spot, and with the special tokens and chat template of a family.

Byte-level BPE of at most 600 ids, so any text survives a round trip. Digits stand alone, and a tag such as
``<answer>`` is one ordinary token: it survives decoding without special tokens, where rewards look for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 600  # 256 bytes, up to 24 special tokens, the rest merges

# Qwen's own pattern (one digit per piece, a word with the space before it), with tags and \boxed in front.
_PIECES = (
    r" ?(?:</?[A-Za-z_]+>|\\[A-Za-z]+)|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Style:
    """How a family marks turns and media.

    Attributes:
        special: All special tokens in id order.
        bos: Token at the start of a document.
        eos: Token that ends a turn, where generation stops.
        pad: Padding; never equal to ``eos``, or the end of a turn would be masked with the padding.
        named: Attribute of the tokenizer to token, for processors that ask for it.
        template: Jinja chat template. Rendering with a generation prompt is a prefix of the full rendering.
    """

    special: tuple[str, ...]
    bos: str
    eos: str
    pad: str
    template: str
    named: Mapping[str, str] = field(default_factory=dict)


def _template(*, head: str, turn: str, tail: str, prompt: str, **media: str) -> str:
    """Compose a template from what stands before, around and after the content of a turn, and for media by kind."""
    shown = "".join("{% elif part['type'] == '" + kind + "' %}" + text for kind, text in media.items())
    return (
        head + "{% for message in messages %}" + turn + "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        + shown.replace("{% elif", "{% if", 1)
        + "{% elif part['type'] == 'text' %}{{ part['text'] }}"
        "{% else %}{{ raise_exception('this model has no part of type ' + part['type']) }}"
        "{% endif %}{% endfor %}{% endif %}" + tail + "{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


def _qwen(
    markers: tuple[str, ...],
    media: Mapping[str, str],
    *,
    turn: str = "<|im_start|>{{ message['role'] }}\n",
    tail: str = "<|im_end|>\n",
    named: Mapping[str, str] | None = None,
) -> Style:
    """Style of Qwen's chats, with the family's own media tokens behind the three that all of them have."""
    return Style(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *markers),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        template=_template(head="", turn=turn, tail=tail, prompt="<|im_start|>assistant\n", **media),
        named=named or {},
    )


_VL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_VL_MEDIA = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
QWEN2 = _qwen(_VL_TOKENS, _VL_MEDIA)
QWEN3 = _qwen(
    _VL_TOKENS,
    # The video processor of Qwen3-VL writes start and end around every frame itself and replaces the outer pair.
    _VL_MEDIA,
    # Qwen3 shows the result of a tool to the model as something the user says.
    turn="{% if message['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{% endif %}",
    # Jinja drops a newline right after a tag, hence the expression.
    tail="{% if message['role'] == 'tool' %}{{ '\n' }}</tool_response>{% endif %}<|im_end|>\n",
)
QWEN2_AUDIO = _qwen(("<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>"), {"audio": "<|audio_bos|><|AUDIO|><|audio_eos|>"})
AUDIO_FLAMINGO = _qwen(("<sound>",), {"audio": "<sound>"})
_OMNI_MEDIA = {
    "image": ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>"),
    "video": ("<|vision_bos|>", "<|VIDEO|>", "<|vision_eos|>"),
    "audio": ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
}
QWEN_OMNI = _qwen(
    (
        *("<|vision_bos|>", "<|vision_eos|>", "<|audio_bos|>", "<|audio_eos|>"),
        *("<|IMAGE|>", "<|VIDEO|>", "<|AUDIO|>"),
    ),
    {kind: "".join(tokens) for kind, tokens in _OMNI_MEDIA.items()},
    named={
        **{f"{kind}_token": tokens[1] for kind, tokens in _OMNI_MEDIA.items()},
        **{"vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>"},
        **{"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"},
    },
)
SMOLVLM = Style(
    special=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
    ),
    bos="<|im_start|>",
    eos="<end_of_utterance>",
    pad="<|im_end|>",
    template=_template(
        head="<|im_start|>",
        # As released: no space between the colon and a picture.
        turn="{{ message['role'] | capitalize }}{% if message['content'] is string or not message['content'] "
        "or message['content'][0]['type'] != 'image' %}: {% else %}:{% endif %}",
        tail="<end_of_utterance>\n",
        prompt="Assistant:",
        image="<image>",
        video="<video>",
    ),
)


def train(style: Style, corpus: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the built-in sentences and on ``corpus``.

    Args:
        style: Special tokens and chat template.
        corpus: More text to learn merges from, for example the rows of a task; None for the built-in text alone.

    Returns:
        A fast tokenizer of at most 600 ids that pads on the left. The same text gives the same tokenizer.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(style.special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # the set comes in a random order
        show_progress=False,
    )
    bpe.train_from_iterator([*sentences(), *(corpus or ())], trainer)
    named = {style.bos, style.eos, style.pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=style.bos,
        eos_token=style.eos,
        pad_token=style.pad,
        extra_special_tokens=[token for token in style.special if token not in named],
        **({"model_specific_special_tokens": dict(style.named)} if style.named else {}),
        padding_side="left",
        clean_up_tokenization_spaces=False,  # it would eat spaces before punctuation on decoding
        model_max_length=32768,
    )
    tokenizer.chat_template = style.template
    return tokenizer


_WORDS = (
    "red green blue yellow orange purple pink brown black white grey",
    "T-shirt trouser pullover dress coat sandal shirt sneaker bag ankle boot",
    "circle square triangle star digit number picture image tile item",
    "left right top bottom middle first second third last same",
    "zero one two three four five six seven eight nine ten yes no",
)
_QUESTIONS = (
    "What colour is the {}?",
    "How many {} items are there in this picture?",
    "Is there a {} in the image? Answer yes or no.",
    "Which of the pictures shows a {}?",
    "Where is the {}, from left to right?",
    "What is the sum of the digits next to the {}?",
    "Compare the {} with the other and count.",
)
_ANSWERS = (
    "<answer>{}</answer>",
    "Answer in <answer></answer>. <answer>{}</answer>",
    "The answer is \\boxed{{{}}}.",
    "It is a {}.",
    "<think>I see the {}</think>",
    "Yes, no, {}",
    "Answer with a single word or number: {}",
    "Think step by step, then put your final answer within \\boxed{{}}. {}",
)
_TURNS = (
    "system\n", "user\n", "assistant\n", "tool\n", "System:", "User:", "Assistant:", "Tool:",
    "You are a helpful assistant.", "(A) (B) (C) (D)", "Answer with the letter of the correct option.",
    "Answer in <answer> tags.", "Answer with the letter in <answer> tags.", "t-shirt trousers",
    "Which digit is larger?", "Name the bigger digit.", "What do the two digits add up to?", "Count the shoes.",
    "What digit do you see on the right?", "Read the digit in the middle.", "How many of the pieces are shoes?",
    "Which piece of clothing is this?", "What does the picture show?", "Add the two digits.",
)  # fmt: skip


def sentences() -> Iterator[str]:
    """The built-in text: visual questions with their answers, in a fixed order."""
    words = " ".join(_WORDS).split()
    for word in words:
        for pattern in (*_QUESTIONS, *_ANSWERS):
            yield pattern.format(word)
    for _ in words:  # often enough that every word of a likely answer is one id, with and without a space before it
        yield from _TURNS
        yield from words
