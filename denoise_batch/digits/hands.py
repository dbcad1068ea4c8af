"""The hands that drawn digits are written in: the strokes of each digit, in the ways that people write it.

A line of the table has the digit, the hand's share among the digit's hands, and its strokes: a stroke is a smooth curve
through the points it spells (a is the first), and where one stroke begins on another's point there is a corner. The two
lines below have the points of the hand's two extremes, x to the right and y downwards, in a box of about 100×100; a
writer is somewhere between them.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

Points = tuple[tuple[float, float], ...]

_TABLE = """
0 4 abcdefghi  # closed or open at the top
  62,2 30,8 8,42 10,74 40,98 76,84 92,48 80,14 48,2
  74,10 40,2 10,32 8,72 38,98 72,92 94,58 84,22 50,14
0 1 abcdefghij  # the ends crossing in a loop
  40,22 62,0 30,4 8,40 14,80 46,99 80,80 90,40 72,10 46,8
  66,20 74,2 34,6 6,44 12,84 48,98 84,72 88,34 62,12 30,18
1 5 abcd  # a bar
  50,0 50,35 50,70 50,100
  58,0 52,35 48,70 48,100
1 1 ab bcd  # with a flag
  34,22 54,0 54,50 54,100
  28,30 52,0 50,50 48,100
1 0.7 ab bcd ef  # with a flag and a base
  36,20 54,0 54,50 54,100 28,100 82,100
  24,24 52,2 50,50 50,97 18,98 84,96
2 3 abcdef fgh  # with a corner
  10,24 34,2 74,8 76,36 44,70 8,97 50,95 92,96
  14,30 30,6 64,2 82,26 56,64 14,94 52,90 96,98
2 3 abcdefghij  # with a loop
  10,22 42,1 76,16 68,46 36,82 14,94 8,78 30,74 60,90 95,90
  16,40 22,8 64,2 80,34 54,74 20,96 6,78 30,66 62,80 98,84
2 1.2 abc cde efg  # like a Z
  8,6 46,4 84,4 48,50 8,95 50,95 92,95
  12,14 44,2 78,10 52,52 12,94 52,90 94,96
2 1 abcdef fgh  # with a small top
  24,16 42,2 62,8 60,34 36,66 10,94 56,88 100,84
  14,16 36,2 66,8 62,34 34,66 8,92 54,82 100,70
3 4 abcde efghi  # two bowls
  12,14 44,0 74,14 66,36 36,47 74,56 84,78 50,99 8,88
  8,6 50,0 80,18 66,40 32,46 70,54 78,80 42,98 10,96
3 2 abcdefghijk  # with a loop between them
  12,10 48,0 76,14 62,38 34,50 30,42 52,44 80,62 74,90 36,99 6,86
  6,16 44,2 70,12 60,36 36,46 40,52 58,48 84,66 70,92 34,98 8,92
3 1.5 abc cd defgh  # with a flat top
  10,4 46,3 82,3 42,40 80,54 84,80 48,99 8,88
  16,12 46,6 70,2 40,42 68,52 70,80 44,98 10,90
4 3 abc cde fgh  # open, with a corner
  22,2 14,30 8,56 50,56 92,52 74,4 70,50 66,100
  32,6 18,28 6,52 48,52 96,46 70,12 66,50 64,98
4 3 abcde fgh  # open, round
  18,4 12,32 28,52 58,48 78,34 84,2 74,50 64,100
  10,10 8,36 26,50 54,46 74,36 76,8 72,50 70,98
4 1.2 abc cde afg  # closed
  62,0 36,30 8,62 50,61 96,60 62,50 60,100
  70,4 38,26 10,54 52,55 92,52 66,50 58,98
5 3 abc cdefg ahi  # with a bar
  30,4 24,24 20,44 54,38 82,60 68,90 8,94 58,4 88,2
  26,8 28,26 24,42 60,44 78,66 56,94 10,88 54,4 84,0
5 1.5 abc cdefg ahi  # with a bar far above
  36,14 30,30 20,46 50,44 68,62 54,92 10,84 66,8 100,2
  40,14 32,32 18,52 52,42 76,66 40,98 8,74 66,6 98,10
5 2 abcdefghi  # in one turn, like an S
  84,4 58,4 32,8 26,30 34,44 66,54 76,76 50,98 8,92
  92,2 62,8 38,12 28,32 40,42 72,58 70,82 42,98 10,90
6 3 abcdefgh  # with a round belly
  72,2 36,24 10,62 24,96 66,96 82,68 52,52 16,72
  60,0 30,22 12,58 22,94 60,98 78,74 50,58 22,78
6 2 abcdefgh  # with a long stem and a small loop
  60,0 34,32 16,70 30,97 62,92 66,68 42,62 20,82
  50,0 26,30 14,66 28,98 70,94 76,66 44,60 18,76
6 2 abcdefghi  # with a straight stem beside a wide loop
  34,0 16,36 10,72 32,98 74,92 88,62 62,44 32,60 20,84
  22,4 8,38 12,76 44,99 84,84 80,52 58,48 38,62 34,88
7 4 abc cde  # plain
  8,8 46,6 86,6 58,50 40,100
  10,12 48,8 82,2 62,50 54,100
7 1.5 abc cde fg  # with a bar
  8,8 46,6 86,6 58,50 40,100 28,54 82,50
  10,20 40,6 82,4 62,50 48,100 30,62 92,48
7 2 ab bcd def  # with a serif
  10,30 14,6 50,8 86,4 58,50 42,100
  4,24 22,8 50,14 88,4 64,50 54,100
7 2 abcdef  # round
  8,16 30,4 64,4 84,14 62,54 46,100
  6,24 30,4 68,2 84,20 72,56 50,100
8 4 abcdefghij  # begun at the top right, closed or open
  72,12 44,0 20,20 48,46 82,74 50,100 16,78 48,50 80,22 70,8
  86,10 48,2 16,22 44,46 76,76 44,98 18,80 50,50 84,28 90,4
8 1 abcdefghi  # two rings
  48,46 20,24 48,0 78,22 48,46 14,74 48,100 84,74 48,46
  46,44 26,22 52,0 76,20 50,46 16,72 44,98 76,76 50,48
8 1 abcdefghij  # with a narrow foot
  82,14 44,0 12,22 44,50 64,76 48,100 34,80 50,52 84,28 76,8
  74,12 46,0 14,24 46,46 58,76 40,100 32,78 56,48 86,24 72,6
9 4 abcdef fgh  # with a straight stem
  80,14 48,2 14,28 36,50 72,38 82,10 76,54 68,100
  74,6 36,8 14,34 38,54 70,36 78,8 68,52 54,98
9 2 abcdefghi  # with a curved tail
  76,10 44,2 12,26 34,50 70,40 80,14 82,56 64,92 22,96
  72,14 40,2 14,24 32,48 66,42 76,16 78,58 56,94 26,88
9 2 abcde fgh  # with a pointed head
  84,6 48,2 14,26 34,50 76,34 80,14 74,56 66,100
  76,8 40,4 14,26 36,50 78,32 84,22 76,56 54,98
"""


@dataclass(frozen=True)
class Hand:
    """One way of writing one digit.

    Attributes:
        label: the digit.
        share: how often this hand is drawn, relative to the digit's other hands.
        strokes: for each stroke the points that the pen passes, by number.
        first, second: the points at the two extremes; as many in both.
    """

    label: int
    share: float
    strokes: tuple[tuple[int, ...], ...]
    first: Points
    second: Points


def _parse(table: str) -> tuple[Hand, ...]:
    lines = [line.partition("#")[0] for line in table.strip().splitlines()]
    hands = []
    for head, first, second in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        label, share, *words = head.split()
        strokes = tuple(tuple(string.ascii_lowercase.index(letter) for letter in word) for word in words)
        hands.append(Hand(int(label), float(share), strokes, _points(first), _points(second)))
    return tuple(hands)


def _points(line: str) -> Points:
    pairs = (pair.split(",") for pair in line.split())
    return tuple((float(x), float(y)) for x, y in pairs)


HANDS = _parse(_TABLE)
"""All hands, those of one digit together, the digits in order."""
