r"""Show texts of users and data without letting them control a terminal or a page.

Names of domains, paths and documents may hold escape sequences, which move the cursor, hide lines or set the title of
the terminal, and bidirectional controls, which show text in another order than it has. Such characters are shown as
`\u001b`: the form that JSON has for them, so JSON stays valid.
"""

import re

__all__ = ["escape_controls"]

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, line separators, and bidirectional controls."""


def escape_controls(text: str) -> str:
    r"""Return `text` with every control character but tab and newline as `\uXXXX`."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
