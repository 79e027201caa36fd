"""Every pruner once more, written out slowly from its definition, in plain loops of numpy.

Nothing here comes from the package. One image at a time: arrays have no batch dimension.
"""

from __future__ import annotations

import math

import numpy as np


def best_first(scores, count):
    """Again and again the best that is left; of equals the first."""
    left, chosen = list(range(len(scores))), []
    for _ in range(count):
        best = left[0]
        for index in left:
            if scores[index] > scores[best]:
                best = index
        chosen.append(best)
        left.remove(best)
    return chosen


def cosine(one, other):
    return float(one @ other) / (math.sqrt(one @ one) * math.sqrt(other @ other))


def cls_scores(cls, patches):
    return np.array([cosine(cls, patch) for patch in patches])


def text_scores(text, embeds, sign):
    return np.array([sign * float(text @ patch) for patch in embeds])


def word_scores(words, embeds):
    """Mean of each token's cosines with the words."""
    return np.array([sum(cosine(word, e) for word in words) / len(words) for e in embeds])


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return np.array([power / sum(powers) for power in powers])


def next_layer_attention(query, keys):
    """Row of CLS, whose own key comes first; one head as wide as the tower."""
    logits = [float(query @ key) / math.sqrt(len(query)) for key in keys]
    return softmax(logits)[1:]


def prumerge_features(patches, keys, attention, chosen):
    merged = []
    for i in chosen:
        similarity = [-9.0 if j == i else cosine(keys[i], keys[j]) for j in range(len(patches))]
        total = patches[i].copy()
        for j in best_first(similarity, min(32, len(patches) - 1)):
            total += attention[j] * patches[j]
        merged.append(total)
    return np.array(merged)


def prumerge_plus(attention, count):
    best = max(1, math.floor(count / 4 + 0.5))
    chosen = best_first(attention, best)
    spread = count - best
    for j in range(spread):
        place = math.floor(j * len(attention) / spread)
        if place not in chosen:
            chosen.append(place)
    for index in best_first(attention, len(attention)):
        if len(chosen) < count and index not in chosen:
            chosen.append(index)
    return chosen


def visionzip(patches, keys, attention, count):
    """Chosen tokens in the authors' order, and their features."""
    num_context = math.floor(count * 10 / 64 + 0.5)
    dominant = sorted(best_first(attention, count - num_context))
    rest = [i for i in range(len(patches)) if i not in dominant]
    targets = []
    if num_context:
        targets = rest[:: max(1, len(rest) // num_context)][:num_context]
    members = {target: [] for target in targets}
    for j in rest:
        if j in targets or not targets:
            continue
        similarity = [cosine(keys[j], keys[target]) for target in targets]
        members[targets[best_first(similarity, 1)[0]]].append(j)
    features = [patches[i] for i in dominant]
    for target in targets:
        joined = [patches[j] for j in members[target]]
        features.append(patches[target] + (np.mean(joined, axis=0) if joined else 0))
    return dominant + targets, np.array(features)


def divprune(embeds, count):
    size = len(embeds)
    unit = [e / math.sqrt(e @ e) for e in embeds]
    distance = [[1 - float(a @ b) for b in unit] for a in unit]
    nearest = [min([distance[i][j] for j in range(size) if j != i], default=0) for i in range(size)]
    chosen = best_first(nearest, 1)
    while len(chosen) < count:
        merit = [-9.0 if i in chosen else min(distance[i][j] for j in chosen) for i in range(size)]
        chosen += best_first(merit, 1)
    return chosen


def cdpruner(embeds, fits, count):
    """By the definition: each time the token that makes the determinant largest."""
    fits = np.array(fits)
    relevance = (fits - fits.min() + 1e-6) / max(fits.max() - fits.min(), 1e-6)
    unit = [e / math.sqrt(e @ e) for e in embeds]
    kernel = np.array([[float(a @ b) for b in unit] for a in unit])
    kernel = relevance[:, None] * kernel * relevance[None, :]
    chosen = []
    while len(chosen) < count:
        gains = []
        for i in range(len(embeds)):
            if i in chosen:
                gains.append(-np.inf)
                continue
            among = kernel[np.ix_(chosen, chosen)]
            toward = kernel[i, chosen]
            gains.append(kernel[i, i] - (toward @ np.linalg.solve(among, toward) if chosen else 0))
        chosen += best_first(gains, 1)
    return chosen


def between(values, least):
    """The smallest becomes ``least``, the largest 1."""
    low, high = min(values), max(values)
    return [least + (1 - least) * (v - low) / max(high - low, 1e-6) for v in values]


def extent(embeds, count, fits=None):
    weights = between([math.sqrt(e @ e) for e in embeds], 0.4)
    if fits is not None:
        weights = [w * fit for w, fit in zip(weights, between(fits, 0.1), strict=True)]
    unit = [e / math.sqrt(e @ e) for e in embeds]
    chosen = best_first(weights, 1)
    while len(chosen) < count:
        merits = []
        for i, weight in enumerate(weights):
            nearest = min(1 - float(unit[i] @ unit[j]) for j in chosen)
            merits.append(-9.0 if i in chosen else weight * nearest)
        chosen += best_first(merits, 1)
    return chosen


def dart(embeds, count):
    norms = [sum(abs(x) for x in embed) for embed in embeds]
    num_pivots = min(4, count)
    pivots = best_first(norms, num_pivots)
    chosen, others = list(pivots), count - num_pivots
    for number, pivot in enumerate(pivots):
        share = math.floor((number + 1) * others / num_pivots) - math.floor(
            number * others / num_pivots
        )
        unlike = [
            -9.0 if i in chosen else -cosine(embeds[pivot], embeds[i]) for i in range(len(embeds))
        ]
        chosen += best_first(unlike, share)
    return chosen


def d2pruner(importance, embeds, places, count):
    size = len(importance)
    lines = [
        [[i for i in range(size) if places[i][axis] == at] for at in range(size)] for axis in (0, 1)
    ]
    mean = sum(importance) / size
    relative = []
    for i in range(size):
        row, col = (lines[axis][places[i][axis]] for axis in (0, 1))
        by_row = sum(importance[j] for j in row) / len(row)
        by_col = sum(importance[j] for j in col) / len(col)
        relative.append(importance[i] / (by_row * by_col / mean))
    chosen = best_first(relative, count * 7 // 10)
    longest = max(math.dist(one, other) for one in places for other in places) or 1

    def are_neighbors(i, j):
        alike = (1 + cosine(embeds[i], embeds[j])) / 2
        return (alike + 1 - math.dist(places[i], places[j]) / longest) / 2 > 0.8

    left = [i for i in best_first(relative, size) if i not in chosen]
    out = []
    while len(chosen) < count and left:
        best = left.pop(0)
        chosen.append(best)
        out += [i for i in left if are_neighbors(best, i)]
        left = [i for i in left if i not in out]
    return chosen + [i for i in best_first(relative, size) if i in out][: count - len(chosen)]


def nuwa(attention, keys, places, count):
    """Turn after turn: what each region gives, the best of it first."""
    salience = [a * math.sqrt(key @ key) for a, key in zip(attention, keys, strict=True)]
    regions = {}
    for i in best_first(salience, len(salience)):
        regions.setdefault((places[i][0] // 2, places[i][1] // 2), []).append(i)
    chosen = []
    for turn in range(4):
        given = sorted(members[turn] for members in regions.values() if len(members) > turn)
        chosen += [given[k] for k in best_first([salience[i] for i in given], len(given))]
    return chosen[:count]


def litelvlm(fits, attention, count):
    chosen = best_first(fits, math.ceil(count / 2))
    return chosen + [i for i in best_first(attention, len(fits)) if i not in chosen][: count // 2]


def ivc(sums, others, count):
    """Origins, then what another pruner would choose; ``others`` best first."""
    by_cos, by_sin = (best_first(sums[:, k], len(sums)) for k in (0, 1))
    origins = []
    for pair in zip(by_cos, by_sin, strict=True):
        for one in pair:
            if one not in origins and len(origins) < math.floor(count / 5 + 0.5):
                origins.append(one)
    return origins + [i for i in others if i not in origins][: count - len(origins)]


def rope_sums(rows, cols, theta, frequency_axes):
    """Angles of M-RoPE's three axes (time, row, column), or of one."""
    sums, number = [], len(frequency_axes)
    for row in range(rows):
        for col in range(cols):
            ids = (0, row, col) if max(frequency_axes) else (row * cols + col,)
            angles = [ids[axis] / theta ** (k / number) for k, axis in enumerate(frequency_axes)]
            sums.append([sum(map(math.cos, angles)), sum(map(math.sin, angles))])
    return np.array(sums)


def extra_token(patches, kept, weights=None):
    """Mean of the dropped, or their weighted sum; zeros where nothing was dropped."""
    total, count = np.zeros(patches.shape[1]), 0
    for j, patch in enumerate(patches):
        if j not in kept:
            total = total + patch * (1 if weights is None else weights[j])
            count += 1
    return total / count if weights is None and count else total


def centroid(kept, rows, cols):
    dropped = [i for i in range(rows * cols) if i not in kept]
    row = sum(i // cols for i in dropped) / len(dropped)
    col = sum(i % cols for i in dropped) / len(dropped)
    return math.floor(row + 0.5) * cols + math.floor(col + 0.5)


def outliers(scores):
    """How many lie above the third quartile by more than one and a half interquartile ranges."""
    ordered = sorted(float(s) for s in scores)

    def percentile(share):
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    first, third = percentile(0.25), percentile(0.75)
    return sum(score > third + 1.5 * (third - first) for score in ordered)
