"""Ranking and splitting, one pair at a time."""


def rank(score):
    """[(order, gap)] of pairs of scores; equal scores keep the sampled order."""
    return [((1, 0), b - a) if b > a else ((0, 1), a - b) for a, b in ((float(x), float(y)) for x, y in score)]


def split(gap, threshold):
    """Indices of the easy pairs and of the hard ones."""
    easy, hard = [], []
    for i, g in enumerate(gap):
        (easy if g > threshold else hard).append(i)
    return easy, hard


def threshold_for_fraction(gap, easy_fraction):
    """Number of easy pairs that the best threshold gives, by trying every gap and everything as the threshold."""
    sizes = [len(split(gap, t)[0]) for t in [*gap, float("-inf")]]
    return max(n for n in sizes if n <= easy_fraction * len(gap) + 1e-9)
