"""Chat templates by the names that mergekit gives them.

Written anew, on one line each so that no white space is left to chance. They render every
conversation to the very text that mergekit 0.1.5's do, its stray spaces and newlines included.
"""

from __future__ import annotations


def _turns(turn: str, end: str = "") -> str:
    """A template of what is said for each message, and of what invites the answer."""
    return "{% for message in messages %}" + turn + "{% endfor %}" + end


def _invited(text: str) -> str:
    return "{% if add_generation_prompt %}{{ '" + text + "' }}{% endif %}"


_CHATML = _turns(
    r"{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}",
    _invited(r"<|im_start|>assistant\n"),
)
_LLAMA3 = _turns(
    r"{{ (bos_token if loop.first else '') ~ '<|start_header_id|>' ~ message.role "
    r"~ '<|end_header_id|>\n\n' ~ message.content | trim ~ '<|eot_id|>\n' }}",
    _invited(r"<|start_header_id|>assistant<|end_header_id|>\n\n"),
)
_EXAONE = _turns(
    r"{% if loop.first and message.role != 'system' %}"
    r"{{ '        [|system|][|endofturn|]\n\n' }}{% endif %}"
    r"{{ '    [|' ~ message.role ~ '|]' ~ message.content ~ '\n        ' "
    r"~ ('' if message.role == 'user' else '[|endofturn|]') ~ '\n\n' }}",
    _invited(r"    [|assistant|]\n"),
)
# Messages of other roles are left out; a system message stands before all, wherever it came.
_ALPACA = (
    r"{% set ns = namespace(system='') %}"
    + _turns("{% if message.role == 'system' %}{% set ns.system = message.content | trim %}{% endif %}")
    + r"{{ ns.system ~ '\n\n' }}"
    + _turns(
        r"{% set title = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'}"
        r"[message.role] %}"
        r"{% if title %}{{ '### ' ~ title ~ ':\n' ~ message.content | trim }}"
        r"{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}"
    )
    + r"{% if add_generation_prompt and messages[-1].role != 'assistant' %}"
    r"{{ '### Response:\n' }}{% endif %}"
)
_MISTRAL = (
    r"{{ bos_token }}{% set n = 1 if messages[0].role == 'system' else 0 %}"
    r"{% for message in messages[n:] %}"
    r"{% if (message.role == 'user') == (loop.index0 % 2 == 1) %}"
    r"{{ raise_exception('The roles user and assistant must take turns, a system message may stand "
    r"before them') }}"
    r"{% elif message.role == 'user' %}"
    r"{{ ' [INST] ' ~ (messages[0].content ~ '\n\n' if n and loop.first else '') ~ message.content "
    r"~ ' [/INST]' }}"
    r"{% elif message.role == 'assistant' %}{{ ' ' ~ message.content ~ eos_token }}"
    r"{% else %}"
    r"{{ raise_exception('Only the roles user and assistant are known, and system as the first') }}"
    r"{% endif %}{% endfor %}"
)
TEMPLATE_TEXTS = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
