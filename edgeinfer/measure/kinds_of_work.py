"""Questions of four kinds, as many as are wanted: what drafts gain depends on what a model is asked.

An edit repeats most of what it was given, code repeats itself, a list repeats its form, and a talk
repeats little. Each question is drawn from parts, so no two begin alike and none is known beforehand.
"""

from __future__ import annotations

import random
from typing import Literal

Kind = Literal["edit", "code", "lists", "chat"]
KINDS: tuple[Kind, ...] = ("edit", "code", "lists", "chat")

_THINGS = ("invoice", "parcel", "ticket", "recipe", "sensor", "lesson", "vessel", "garden", "ledger")
_FIELDS = ("price", "weight", "count", "length", "score", "height", "delay", "volume", "age", "depth")
_PLACES = ("Lisbon", "Oslo", "Kyoto", "Quito", "Dakar", "Perth", "Turin", "Bergen", "Cusco", "Hanoi")
_TOPICS = (
    *("how bridges are built", "why leaves change their colour", "how bread rises"),
    *("what makes a good map", "how tides come about", "why people keep diaries"),
    *("how a clock works", "what bees do in winter", "how to learn a song", "why rivers bend"),
    *("how glass is made", "what a lighthouse keeper did"),
)
_MOODS = ("for a child of ten", "in a friendly tone", "for someone in a hurry", "as a short story")


def question(kind: Kind, number: int, seed: int = 0) -> str:
    """The `number`-th of its kind: always the same one."""
    draw = random.Random(f"{seed} {kind} {number}")  # noqa: S311 - no secrets
    if kind == "edit":
        return _code_edit(draw) if draw.random() < 0.5 else _text_edit(draw)
    if kind == "code":
        thing, (one, other) = draw.choice(_THINGS), draw.sample(_FIELDS, 2)
        return (
            f"Write a Python class {thing.capitalize()} with the fields {one} and {other}, a property"
            f" and a setter for each, and the methods to_dict, from_dict and __repr__."
        )
    if kind == "lists":
        places = ", ".join(draw.sample(_PLACES, 6))
        return (
            f"Make a list of these cities: {places}. For each write one line of the form"
            " `- City: Country, population: N, river: NAME`."
        )
    topic, mood, place = draw.choice(_TOPICS), draw.choice(_MOODS), draw.choice(_PLACES)
    return f"Explain {topic} {mood}, with an example from {place}."


def _code_edit(draw: random.Random) -> str:
    thing, fields = draw.choice(_THINGS), draw.sample(_FIELDS, 4)
    lines = [f"def load_{thing}(path):", f"    {thing} = read_json(path)"]
    for field in fields:
        lines.append(f'    if "{field}" not in {thing}:')
        lines.append(f'        raise ValueError("{thing} without a {field}: " + path)')
        lines.append(f'    {thing}["{field}"] = float({thing}["{field}"])')
    code = "\n".join([*lines, f"    return {thing}"])
    return (
        f"Here is a function:\n```python\n{code}\n```\nGive me the whole function again, unchanged"
        f" but for its name, which is to be read_{thing}."
    )


def _text_edit(draw: random.Random) -> str:
    one, other, new = draw.sample(_PLACES, 3)
    thing, field, month = draw.choice(_THINGS), draw.choice(_FIELDS), draw.choice(("March", "May"))
    text = (
        f"The {thing} left {one} on a grey morning in {month}. Nobody had written down its {field}, and"
        f" the clerk in {other} would not take it without one. So it was measured again, by two people"
        f" who did not agree, and both figures were sent on to {other}. It took {draw.randint(3, 40)}"
        f" days until an answer came back, and the answer was a question: which {thing} was meant?"
    )
    return f"Repeat the following text word for word, but write {new} instead of {one}:\n\n{text}"
