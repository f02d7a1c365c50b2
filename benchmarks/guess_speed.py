"""How much faster is a text written by guessing ahead (`generate(draft=)`)?

    python benchmarks/guess_speed.py --checkpoint runs/shakespeare                    # 2 minutes on a CPU
    python benchmarks/guess_speed.py --checkpoint runs/large --draft runs/small       # a smaller model guesses, too

One text repeats itself: a small model that always takes the likeliest token ends in a loop. The other is drawn, and
hardly repeats anything. Columns:

    ms              of a token: median of the turns (20th to 80th percentile)
    x plain         how many times as many tokens a second as without guesses
    tokens a call   that a call of the model gave: 1 without guesses
    right           share of the guesses that were right
"""

import sys
from functools import partial

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from measure import alternate, shown, table

from model import from_pretrained, generate
from model.checkpoint import resolve_checkpoint
from model.speculative import Pace

TEXTS = {"repeats itself (greedy)": {"greedy": True}, "drawn (temperature 1)": {"seed": 1}}
PROMPT = "\n"
SECONDS, TOKENS = {"quick": 20.0, "default": 90.0}, {"quick": 300, "default": 1500}
COLUMNS = {
    "text": lambda row: row["shape"],
    "guesses by": lambda row: row["contestant"],
    "ms": shown,
    "tokens/s": lambda row: f"{1e3 / row['median_ms']:,.0f}",
    "x plain": lambda row: f"{row['x_plain']:.2f}",
    "tokens a call": lambda row: f"{row['tokens_a_call']:.2f}",
    "right": lambda row: "" if row["right"] is None else f"{row['right']:.0%}",
}


def main(arguments=None):
    flags = harness.parser("guess_speed", __doc__)
    flags.set_defaults(plot="none")
    flags.add_argument("--checkpoint", required=True, metavar="DIR", help="the model that writes")
    flags.add_argument("--draft", metavar="DIR", help="a smaller model of the same vocabulary")
    flags.add_argument("--tokens", type=int, metavar="N", help="of a text")
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    count = options.tokens or TOKENS["quick" if options.quick else "default"]
    if count < 2:
        raise harness.BadInput(f"--tokens is {count}, wanted at least 2")
    try:
        model, draft = (
            name and from_pretrained(resolve_checkpoint(name), device=device)[0]
            for name in (options.checkpoint, options.draft)
        )
    except ValueError as error:
        raise harness.BadInput(str(error)) from None
    drafts = {"nobody": None, "ngram": "ngram"} | ({"a model": draft} if draft else {})
    points = {text: (text, settings) for text, settings in TEXTS.items()}
    return partial(measure, model, drafts, count, harness.budget(options, points, SECONDS), device)


def measure(model, drafts, count, budget, device):
    rows = []
    for text, settings in budget:
        write = {name: partial(written, model, count, draft=draft, **settings) for name, draft in drafts.items()}
        made = {name: counted(one) for name, one in write.items()}
        times = alternate(write, device, budget.share())
        for name, (tokens, guessed, right) in made.items():
            reason = None if tokens == made["nobody"][0] else "failed the check: it wrote another text"
            row = {"shape": text, "contestant": name, "not_timed": reason}
            if reason is None:
                of_token = times[name].as_dict()
                row |= {key: value / count if key.endswith("_ms") else value for key, value in of_token.items()}
                row |= {"tokens_a_call": count / (count - right), "right": right / guessed if guessed else None}
                row["x_plain"] = times["nobody"].median / times[name].median
            rows.append(row)
    title = f"Writing {count:,} tokens: {model.num_parameters():,} parameters, width {model.config.d_model}"
    return {
        "settings": {"tokens": count},
        "rows": rows,
        "tables": [table(title, rows, COLUMNS)],
        "plots": [],
        "left_out": budget.left_out,
    }


def written(model, count, **settings):
    return torch.cat(list(generate(model, PROMPT, count, **settings))).tolist()


def counted(write):
    """(tokens, guesses, right ones) of a text."""
    found, learn = [], Pace.learn

    def learn_and_count(pace, guessed, right):
        found.append((guessed, right))
        learn(pace, guessed, right)

    Pace.learn = learn_and_count
    try:
        tokens = write()
    finally:
        Pace.learn = learn
    guessed, right = (sum(numbers) for numbers in zip(*found, strict=True)) if found else (0, 0)
    return tokens, guessed, right


if __name__ == "__main__":
    sys.exit(main())
