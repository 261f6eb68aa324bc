"""Synthetic arithmetic text from a seeded function of this package (dedicated to the public domain)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

NAMES = ("Ana", "Ben", "Chloe", "Dan", "Eva", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kim", "Leo", "Mia", "Noah")
THINGS = ("apples", "books", "coins", "pens", "eggs", "stones", "cards", "shells", "keys", "cups")


def _sum(r: random.Random) -> str:
    a, b = r.randint(0, 99), r.randint(0, 99)
    return f"{a} + {b} = {a + b}"


def _difference(r: random.Random) -> str:
    a, b = r.randint(0, 99), r.randint(0, 99)
    return f"{a} - {b} = {a - b}"


def _product(r: random.Random) -> str:
    a, b = r.randint(0, 12), r.randint(0, 12)
    return f"{a} * {b} = {a * b}"


def _division(r: random.Random) -> str:
    a, b = r.randint(0, 12), r.randint(1, 12)
    return f"{a * b} / {b} = {a}"


def _count(r: random.Random) -> str:
    start, step = r.randint(0, 20), r.randint(1, 5)
    return "Count by " + f"{step}: " + ", ".join(str(start + i * step) for i in range(r.randint(5, 9)))


def _compare(r: random.Random) -> str:
    a, b = r.randint(0, 99), r.randint(0, 99)
    word = "greater than" if a > b else "less than" if a < b else "equal to"
    return f"Compare {a} and {b}: {a} is {word} {b}."


def _solve(r: random.Random) -> str:
    x, a, b = r.randint(-9, 9), r.randint(2, 9), r.randint(0, 20)
    return f"Solve {a}*x + {b} = {a * x + b}. x = {x}"


def _sort(r: random.Random) -> str:
    values = [r.randint(0, 50) for _ in range(r.randint(3, 6))]
    return f"Sort {', '.join(map(str, values))}: {', '.join(map(str, sorted(values)))}"


def _parity(r: random.Random) -> str:
    a = r.randint(0, 199)
    return f"Is {a} even? {'Yes' if a % 2 == 0 else 'No'}, {a} is {'even' if a % 2 == 0 else 'odd'}."


def _story(r: random.Random) -> str:
    who, other = r.sample(NAMES, 2)
    thing, a, b = r.choice(THINGS), r.randint(2, 20), r.randint(2, 20)
    if r.random() < 0.5 or b > a:
        return f"{who} has {a} {thing}. {other} gives {who} {b} more {thing}. Now {who} has {a + b} {thing}."
    return f"{who} has {a} {thing}. {who} gives {b} {thing} to {other}. Now {who} has {a - b} {thing}."


KINDS: tuple[Callable[[random.Random], str], ...] = (
    _sum, _difference, _product, _division, _count, _compare, _solve, _sort, _parity, _story,
)  # fmt: skip


def documents(seed: int, count: int) -> Iterator[str]:
    """Yield `count` documents of 10 to 30 lines; half of them keep to one kind of exercise."""
    r = random.Random(seed)
    for _ in range(count):
        lines = r.randint(10, 30)
        only = r.choice(KINDS) if r.random() < 0.5 else None
        yield "\n".join((only or r.choice(KINDS))(r) for _ in range(lines)) + "\n"
