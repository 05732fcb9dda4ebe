"""The town: small stories of people, places and things, drawn from known probabilities, so that their entropy is known.

Derivation: whiteboard/corpus/town.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import itertools
import math
import random
import zlib
from typing import NamedTuple

PEOPLE = tuple("Anna Ben Carla David Ella Felix Grace Henry Ida Jack Kate Leo Mia Nora Oscar Paula Quinn Rosa Sam Tina Uma Victor Wendy Zoe".split())
PLACES = tuple("bakery bank barn bridge castle church garden harbour kitchen library market mill park school station tower".split())
THINGS = tuple("apple ball basket bell book bottle candle coat cup drum flute hat key kite lamp letter map ring rope spoon".split())
COLOURS = tuple("black blue green red white yellow".split())
OPENINGS = ("One morning", "One evening", "Long ago", "Today")
MOVES = ("goes to", "walks to", "runs to")
TAKES = ("takes", "picks up")
DROPS = ("puts down", "drops")
MOST_EVENTS = 7
GO_ON = 0.75                 # the probability of another event, up to MOST_EVENTS
HELD_OUT = 16                # one story in so many is kept for evaluation


class Story(NamedTuple):
    """A text and how likely it was."""
    text: str
    log_p: float             # nats: the sum of the logarithms of all choices; the text determines the choices


class _Narrator:
    """Draws every choice and adds up its log-probability."""

    def __init__(self, rng):
        self.rng, self.text, self.log_p = rng, [], 0.0

    def choose(self, options, weights=None):
        weights = weights or [1 / len(options)] * len(options)
        edge, chosen = self.rng.random(), len(options) - 1
        for i, end in enumerate(itertools.accumulate(weights)):
            if edge < end:
                chosen = i
                break
        self.log_p += math.log(weights[chosen])
        return options[chosen]

    def say(self, text):
        self.text.append(text)


def tell(rng):
    """One story. rng: random.Random. Its probability is the product of its choices, and no other choices give its text."""
    narrator = _Narrator(rng)
    _story(narrator)
    return Story("".join(narrator.text), narrator.log_p)


def _story(n):
    """The plot: who is where, what lies where, what happens, and questions that have one right answer."""
    n.say(n.choose(OPENINGS) + ", ")
    people, where = [], {}
    for i in range(n.choose((2, 3))):
        person = n.choose([p for p in PEOPLE if p not in people])
        people.append(person)
        where[person] = n.choose(PLACES)
        n.say(f"{' and ' if i else ''}{person} is in the {where[person]}")
    n.say(".\n")
    lies, holder = {}, {}                                   # thing -> place, or thing -> person
    for _ in range(n.choose((1, 2))):
        thing = f"{n.choose(COLOURS)} {n.choose([t for t in THINGS if not any(x.endswith(t) for x in lies)])}"
        lies[thing] = n.choose(sorted(set(where.values())))
        n.say(f"There is a {thing} in the {lies[thing]}.\n")
    for event in range(MOST_EVENTS):
        if event and not n.choose((True, False), (GO_ON, 1 - GO_ON)):
            break
        _event(n, people, where, lies, holder)
    for question in range(2):
        if question and not n.choose((True, False)):
            break
        _question(n, people, where, lies, holder)
    n.say("\n")


def _event(n, people, where, lies, holder):
    """Something that can happen now: somebody moves, takes a thing, puts it down, or gives it away."""
    can = {
        "move": [(p, place) for p in people for place in PLACES if place != where[p]],
        "take": [(p, thing) for p in people for thing, place in lies.items() if place == where[p]],
        "drop": [(p, thing) for thing, p in holder.items()],
        "give": [(p, thing, other) for thing, p in holder.items() for other in people if other != p and where[other] == where[p]],
    }
    kind = n.choose([kind for kind, ways in can.items() if ways])
    person, what, *other = n.choose(can[kind])
    if kind == "move":
        n.say(f"{person} {n.choose(MOVES)} the {what}.\n")
        where[person] = what
    elif kind == "take":
        n.say(f"{person} {n.choose(TAKES)} the {what}.\n")
        del lies[what]
        holder[what] = person
    elif kind == "drop":
        n.say(f"{person} {n.choose(DROPS)} the {what}.\n")
        del holder[what]
        lies[what] = where[person]
    else:
        n.say(f"{person} gives the {what} to {other[0]}.\n")
        holder[what] = other[0]


def _question(n, people, where, lies, holder):
    kind = n.choose(("person", "thing", "holder"))
    if kind == "person":
        person = n.choose(people)
        n.say(f"Where is {person}? {person} is in the {where[person]}.\n")
        return
    thing = n.choose(sorted([*lies, *holder]))
    if kind == "thing":
        place = where[holder[thing]] if thing in holder else lies[thing]
        n.say(f"Where is the {thing}? The {thing} is in the {place}.\n")
    else:
        n.say(f"Who has the {thing}? {holder.get(thing, 'Nobody')} has the {thing}.\n")


def stories(seed, *, held_out=False):
    """The endless stream of a seed: the stories to train on, or those that are kept for evaluation, never both.

    Which side a story stands on is a checksum of its text: a text that is drawn twice stands on the same side twice.
    """
    for number in itertools.count():
        story = tell(random.Random(f"{seed}/{number}"))
        if is_held_out(story.text) == held_out:
            yield story


def is_held_out(text):
    """Is this story kept out of training?"""
    return zlib.crc32(text.encode("utf-8")) % HELD_OUT == 0


def text_of(seed, n_bytes):
    """Training stories of at least n_bytes in all, as a list of texts."""
    texts, size = [], 0
    for story in stories(seed):
        texts.append(story.text)
        size += len(story.text)
        if size >= n_bytes:
            return texts


def log_probability(text):
    """The log-probability of a text in nats, or None when the town cannot tell it: the inverse of `tell`.

    The plot is told again with every possible choice that fits the text so far. Exactly one sequence of choices fits a
    possible story, which is what makes its entropy known.
    """
    found = _readings(text)
    assert len(found) <= 1, "two sequences of choices give one text"
    return found[0] if found else None


class _Reader:
    """Takes the choices it is given, then the first option each time, and notes how many there were."""

    def __init__(self, text, choices):
        self.text, self.given, self.options, self.position, self.log_p = text, choices, [], 0, 0.0

    def choose(self, options, weights=None):
        k = len(self.options)
        i = self.given[k] if k < len(self.given) else 0
        self.options.append(len(options))
        self.log_p += math.log(weights[i] if weights else 1 / len(options))
        return options[i]

    def say(self, text):
        if not self.text.startswith(text, self.position):
            raise _Mismatch
        self.position += len(text)


class _Mismatch(Exception):
    """The text says something else."""


def _readings(text):
    """The log-probability of every sequence of choices that tells this text: depth first over the tree of choices."""
    found, choices = [], []
    while True:
        reader = _Reader(text, choices)
        try:
            _story(reader)
            if reader.position == len(text):
                found.append(reader.log_p)
        except _Mismatch:
            pass
        choices = choices + [0] * (len(reader.options) - len(choices))
        while choices and choices[-1] + 1 == reader.options[len(choices) - 1]:      # this branch is used up
            choices.pop()
        if not choices:
            return found
        choices[-1] += 1


def demo():
    """A story, its probability told and read, and the entropy of the town."""
    story = tell(random.Random("demo"))
    print("shapes    a story is a text and a number of nats")
    print("by hand\n" + "".join(f"    {line}\n" for line in story.text.splitlines()), end="")
    read = log_probability(story.text)
    print(f"          told with log-probability {story.log_p:.3f} nats, read again from the text: {read:.3f}")
    sample = list(itertools.islice(stories(0), 1000))
    bits, size = -sum(s.log_p for s in sample) / math.log(2), sum(len(s.text) for s in sample)
    print(f"entropy   {bits / len(sample):.1f} bits per story of {size / len(sample):.0f} bytes: a floor of {bits / size:.3f} bits per byte")
    impossible = story.text.replace(" is in the ", " is in the moon-", 1)
    print(f"claim     told = read: {abs(read - story.log_p) < 1e-9}; a story on the moon is impossible: {log_probability(impossible) is None}")
    assert abs(read - story.log_p) < 1e-9 and log_probability(impossible) is None


if __name__ == "__main__":
    from minideepseek.corpus.town import demo  # the imported copy, so that every name exists once
    demo()
