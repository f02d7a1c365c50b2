"""What the original said of the modified GPT-2, and what was found: holds, does not hold, or depends on something.

A difference of losses counts where its 95 % interval over seeds leaves 0 out; a difference of times where the 20th to
80th percentiles do not overlap. Anything else is a difference that this study cannot tell.
"""

import itertools

from .plan import MODIFIED, ORIGINAL, READINGS
from .results import CACHE_POSITIONS, find_model, token_time

HOLDS, FAILS, DEPENDS, OPEN = "holds", "does not hold", "depends", "cannot be told"


def judge(document: dict) -> list[dict]:
    """[{claim, verdict, found}]: the three claims, the first for every context and also by the clock."""
    contexts = document["design"]["contexts"]
    claims = [better_loss(document, context) for context in contexts]
    claims += [better_by_the_clock(document, context) for context in contexts]
    claims += [faster_sampling(document, context) for context in contexts]
    return [*claims, little_size(document, contexts)]


def better_loss(document: dict, context: int) -> dict:
    """Lower held-out loss after the same characters."""
    rows = {reading: find_model(document, context, reading, MODIFIED) for reading in READINGS}
    original = find_model(document, context, READINGS[0], ORIGINAL)
    found = [
        f"{reading}: {row['loss']['mean']:.3f} nats a character against {original['loss']['mean']:.3f}, "
        f"{signed(row['minus_original'])}"
        for reading, row in rows.items()
    ]
    return {
        "claim": f"It trains better at a context of {context}: a lower held-out loss after the same characters",
        "verdict": verdict({reading: -row["minus_original"]["sign"] for reading, row in rows.items()}),
        "found": "; ".join(
            [
                *found,
                f"of which at equal width {shares(document, context)}",
                *at_best_rates(document, context),
                *not_looking_back(original, context),
            ]
        ),
    }


def at_best_rates(document: dict, context: int) -> list[str]:
    """The difference with the best learning rate for each that was tried, where several were, and which those are."""
    tried = {name: {} for name in (ORIGINAL, MODIFIED)}
    for row in document["rates"]:
        if row["context"] == context:
            tried[row["architecture"]][row["learning_rate"]] = row["loss"]
    if len(tried[ORIGINAL]) < 2:
        return []
    best = {name: min(losses, key=losses.get) for name, losses in tried.items()}
    apart = tried[MODIFIED][best[MODIFIED]] - tried[ORIGINAL][best[ORIGINAL]]
    edge = {name: " (the largest tried)" if rate == max(tried[name]) else "" for name, rate in best.items()}
    return [
        f"{apart:+.3f} with the best learning rate for each, {best[MODIFIED]:g}{edge[MODIFIED]} and for the original "
        f"{best[ORIGINAL]:g}{edge[ORIGINAL]} (one seed, equal width)"
    ]


def not_looking_back(row: dict, context: int) -> list[str]:
    """A remark on a model that predicts no better from its whole context than from two characters; else nothing.

    It is still learning which character follows which, and another that has gone on to look back is far ahead of it
    for now.
    """
    bins = {b["last"]: b for b in row["loss_by_position"]}
    two, whole = bins[2]["loss"]["mean"], bins[context]["loss"]["mean"]
    if whole < two:
        return []
    return [
        f"the {row['architecture']} has not begun to look back: {whole:.3f} after {bins[context]['first']} or more "
        f"characters, {two:.3f} after 2, so what it can do with more training is not known from this"
    ]


def better_by_the_clock(document: dict, context: int) -> dict:
    """Lower held-out loss in the time that the original takes, each on the path on which its steps are faster.

    A model whose steps take longer is read off its curve at the time at which the original has ended, where its
    learning rate has not come down yet: that is to its disadvantage.
    """
    original = find_model(document, context, READINGS[0], ORIGINAL)
    signs, found = {}, []
    for reading in READINGS:
        row = find_model(document, context, reading, MODIFIED)
        ratio = row["seconds"] / original["seconds"]
        margin = row["minus_original"]["margin"]
        # both from the curves: those are measured on fewer characters than the final losses
        loss, end = loss_at(row["curve"], original["seconds"]), original["curve"][-1]["loss"]["mean"]
        apart = margin is not None and abs(loss - end) > margin
        signs[reading] = (1 if loss < end else -1) if apart else 0
        told = faster(row["step_ms"][row["path"]], original["step_ms"][original["path"]])
        found.append(
            f"{reading}: a step takes {ratio:.2f} times as long{'' if told else ' (the spreads overlap)'}, and when "
            f"the original has ended it is {loss:.3f} against {end:.3f}"
        )
    return {
        "claim": f"It trains better at a context of {context} by the clock",
        "verdict": verdict(signs),
        "found": "; ".join(found),
    }


def faster_sampling(document: dict, context: int) -> dict:
    """A shorter time a token, beside the original with the same sampler."""
    modified, original = (find_model(document, context, READINGS[0], name) for name in (MODIFIED, ORIGINAL))
    signs, found = {}, []
    for position in CACHE_POSITIONS:
        ours, theirs = token_time(modified, position), token_time(original, position)
        if ours is None or theirs is None:
            continue
        signs[f"position {position:,}"] = faster(ours, theirs)
        recomputed = token_time(original, position, "recomputing")
        found.append(
            f"position {position:,}: {ours['median_ms']:.2f} ms a token against {theirs['median_ms']:.2f} "
            f"({recomputed['median_ms']:.2f} as the original sampler does it)"
        )
    return {
        "claim": f"It samples faster (context {context})",
        "verdict": verdict(signs),
        "found": "; ".join(found),
    }


def little_size(document: dict, contexts) -> dict:
    """Parameters and cache beside the original's."""
    found, more = [], False
    for context in contexts:
        modified, original = (find_model(document, context, READINGS[0], name) for name in (MODIFIED, ORIGINAL))
        parameters = modified["parameters"] / original["parameters"] - 1
        cache = modified["kv_bytes_per_token"] / original["kv_bytes_per_token"]
        more |= parameters > 0
        found.append(
            f"context {context}: {modified['parameters']:,} parameters against {original['parameters']:,} "
            f"({parameters:+.1%}), a cache of {modified['kv_bytes_per_token']:,} bytes a token against "
            f"{original['kv_bytes_per_token']:,} ({cache:.0%})"
        )
    return {
        "claim": "It costs little size",
        "verdict": FAILS if more else f"{HOLDS}: it is smaller",
        "found": "; ".join(found),
    }


def shares(document: dict, context: int) -> str:
    """What each change brings on the way, in words."""
    names = {"rope": "rotary positions", "rope-window": "the window", MODIFIED: "grouped heads"}
    steps = (c for c in document["changes"] if (c["context"], c["reading"]) == (context, READINGS[0]))
    return ", ".join(f"{names[c['to']]} {signed(c['difference'])}" for c in steps if c["to"] in names)


def verdict(signs: dict[str, int]) -> str:
    """The verdict on what may be better (1), worse (-1) or neither (0) in several respects."""
    if set(signs.values()) == {1}:
        return HOLDS
    if set(signs.values()) == {-1}:
        return FAILS
    if set(signs.values()) <= {0}:
        return OPEN
    words = {1: "yes", -1: "no", 0: "not told apart"}
    return f"{DEPENDS}: " + ", ".join(f"{respect} {words[sign]}" for respect, sign in signs.items())


def faster(ours: dict, theirs: dict) -> int:
    """1 or -1 where the 20th to 80th percentiles of two times do not overlap, else 0."""
    if ours["p80_ms"] < theirs["p20_ms"]:
        return 1
    return -1 if ours["p20_ms"] > theirs["p80_ms"] else 0


def loss_at(curve: list[dict], seconds: float) -> float:
    """The mean loss of a curve at a time, on the straight line between two of its points."""
    for before, after in itertools.pairwise(curve):
        if seconds <= after["seconds"]:
            share = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"])
            return before["loss"]["mean"] + share * (after["loss"]["mean"] - before["loss"]["mean"])
    return curve[-1]["loss"]["mean"]


def signed(difference: dict) -> str:
    """A difference with the half of its 95 % interval: "-0.084 ± 0.012"."""
    if difference["margin"] is None:
        return f"{difference['mean']:+.3f} (one seed)"
    return f"{difference['mean']:+.3f} ± {difference['margin']:.3f}"
