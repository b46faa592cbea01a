# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Texts on which rules of words differ: spaces before digits, scripts, marks, ends of lines, contractions."""

import random

TEXTS = [
    "x  1",
    "    12 = 3",
    "1234",
    "(f",
    ";\n",
    "for (i = 0; i < 10; ++i) {\n\t\tf(i);\n}\n\n\n",
    "漢字かな交じり文、1969年。한국어 문장",
    "🙂👩\u200d👩\u200d👧 a🙂b ¡olé!",
    "e\u0301 A\u030a n\u0303o",
    "I'M don'T he'LL they're 'Sam's",
    "٣٤٥ १२३ Ⅷ ½ ²",
    "a\tb \t c\r\n d\u00a0e\u2003f",
    "ÉCOLE École ÀaBcDé LaTeX GPTmodel",
    "http://example.org/a/b?c=1&d=2/\n/",
    "price: $1,234.56 + 7^2 <= 100 | ~x",
    "  leading and trailing  ",
    "\n\n \n",
    "नमस्ते สวัสดี שלום",
    "snake_case camelCase2 x_1y",
    "",
]


def random_texts(count=150):
    source = random.Random(0)
    letters = list("aZéÉß漢한ǅ'stLL  \t\n\r12٣½.,;$<_/(🙂\u0301\u00a0ſ")
    return ["".join(source.choices(letters, k=12)) for _ in range(count)]
