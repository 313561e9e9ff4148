"""Overlap of two texts: words, longest common subsequence, character n-grams, final numbers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_WORD = re.compile(r"[a-z0-9]+")

CHARACTER_ORDERS = 6


def squad_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD's own script compares answers."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return _ARTICLES.sub(" ", bare).split()


def word_f1(answer: str, wanted: str) -> float:
    """F1 of the words that both texts have (Rajpurkar et al. 2016); two empty answers agree."""
    ours, theirs = squad_words(answer), squad_words(wanted)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def rouge_l(answer: str, wanted: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), words as the rouge-score package cuts them."""
    ours, theirs = _WORD.findall(answer.lower()), _WORD.findall(wanted.lower())
    if not ours or not theirs:
        return 0.0
    shared = _common_subsequence(ours, theirs)
    return 2 * shared / (len(ours) + len(theirs))


def _common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    best = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for column, other in enumerate(theirs, start=1):
            diagonal, best[column] = (
                best[column],
                diagonal + 1 if word == other else max(best[column], best[column - 1]),
            )
    return best[-1]


def character_counts(answer: str, wanted: str) -> list[tuple[int, int, int]]:
    """Counts of character n-grams of orders 1 to 6, without white space: in the answer, in the wanted text, and in both."""
    ours, theirs = "".join(answer.split()), "".join(wanted.split())
    counts = []
    for order in range(1, CHARACTER_ORDERS + 1):
        mine, other = _grams(ours, order), _grams(theirs, order)
        counts.append((sum(mine.values()), sum(other.values()), sum((mine & other).values())))
    return counts


def chrf(counts: Sequence[tuple[float, float, float]]) -> float:
    """chrF2 (Popović 2015) of summed counts, 0 to 100: recall weighs twice, orders without n-grams are skipped."""
    precision = recall = 0.0
    orders = 0
    for answered, wanted, both in counts:
        if answered > 0 and wanted > 0:
            precision += both / answered
            recall += both / wanted
            orders += 1
    if not orders or precision + recall == 0:
        return 0.0
    precision, recall = precision / orders, recall / orders
    return 100 * 5 * precision * recall / (4 * precision + recall)


def _grams(text: str, order: int) -> Counter[str]:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))


def final_number(text: str) -> Decimal | None:
    """The number after "####" (gsm8k's mark), else the last one in the text; None without any."""
    marked = text.rpartition("####")[2] if "####" in text else ""
    numbers = _NUMBER.findall(marked)[:1] or _NUMBER.findall(text)[-1:]
    if not numbers:
        return None
    try:
        return Decimal(numbers[0].replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
