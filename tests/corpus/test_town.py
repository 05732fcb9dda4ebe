import functools
import hashlib
import itertools
import math
import random
import re

import numpy as np
import pytest

from minideepseek.corpus import town

COUNTS = {"people": 24, "places": 16, "things": 20, "colours": 6}
THING = r"[a-z]+ [a-z]+"


def drawn(seed, n):
    """The first n stories of a seed on either side, as `tell` makes them."""
    return [town.tell(random.Random(f"{seed}/{number}")) for number in range(n)]


# ---- an independent reader: a small simulator that follows the text line by line and adds up what its choices cost ----

def read_along(text):
    """(log-probability in nats, the answers checked), or AssertionError at the first line that cannot be."""
    lines = text.split("\n")
    assert lines[-2:] == ["", ""] and "" not in lines[:-2]
    opening, first = re.fullmatch(r"(One morning|One evening|Long ago|Today), (.*)\.", lines[0]).groups()
    where, lies, held, price = {}, {}, {}, [4, 2]
    for clause in first.split(" and "):
        person, place = re.fullmatch(r"([A-Z][a-z]+) is in the ([a-z]+)", clause).groups()
        assert person in town.PEOPLE and place in town.PLACES and person not in where
        price += [COUNTS["people"] - len(where), COUNTS["places"]]
        where[person] = place
    assert len(where) in (2, 3)
    rest = lines[1:-2]
    price.append(2)
    while rest and (match := re.fullmatch(rf"There is a ({THING}) in the ([a-z]+)\.", rest[0])):
        thing, place = match.groups()
        colour, noun = thing.split()
        assert colour in town.COLOURS and noun in town.THINGS and noun not in {other.split()[1] for other in lies} and place in where.values()
        price += [COUNTS["colours"], COUNTS["things"] - len(lies), len(set(where.values()))]
        lies[thing] = place
        rest.pop(0)
    assert len(lies) in (1, 2)
    events = [line for line in rest if "?" not in line]
    questions = rest[len(events):]
    assert 1 <= len(events) <= 7 and 1 <= len(questions) <= 2 and all("?" in line for line in questions)
    for line in events:
        price += act(line, where, lies, held)
    price += [1 / 0.75] * (len(events) - 1) + ([1 / 0.25] if len(events) < 7 else [])
    for line in questions:
        price += answer(line, where, lies, held)
    return -sum(map(math.log, price + [2])), len(questions)               # the last: whether there is a second question


def act(line, where, lies, held):
    """Let one event happen, if it can; return what its choices cost: among how many, each."""
    person, rest = line.removesuffix(".").split(" ", 1)
    takes = [(p, thing) for p in where for thing in lies if lies[thing] == where[p]]
    gives = [(thing, other) for thing, p in held.items() for other in where if other != p and where[other] == where[p]]
    kinds = 1 + bool(takes) + bool(held) + bool(gives)
    assert line.endswith(".") and person in where
    if match := re.fullmatch(r"(?:goes|walks|runs) to the ([a-z]+)", rest):
        assert match[1] in town.PLACES and match[1] != where[person]
        where[person] = match[1]
        return [kinds, len(where) * 15, 3]
    if match := re.fullmatch(rf"(?:takes|picks up) the ({THING})", rest):
        assert (person, match[1]) in takes
        held[match[1]] = person
        del lies[match[1]]
        return [kinds, len(takes), 2]
    if match := re.fullmatch(rf"(?:puts down|drops) the ({THING})", rest):
        assert held[match[1]] == person
        n = len(held)
        lies[match[1]] = where[held.pop(match[1])]
        return [kinds, n, 2]
    thing, other = re.fullmatch(rf"gives the ({THING}) to ([A-Z][a-z]+)", rest).groups()
    assert held[thing] == person and (thing, other) in gives
    held[thing] = other
    return [kinds, len(gives)]


def answer(line, where, lies, held):
    """Check one question and its answer; return what its choices cost."""
    if match := re.fullmatch(r"Where is ([A-Z][a-z]+)\? (\w+) is in the ([a-z]+)\.", line):
        assert match[1] == match[2] and where[match[1]] == match[3]
        return [3, len(where)]
    if match := re.fullmatch(rf"Where is the ({THING})\? The ({THING}) is in the ([a-z]+)\.", line):
        assert match[1] == match[2] and match[3] == (lies[match[1]] if match[1] in lies else where[held[match[1]]])
        return [3, len(lies) + len(held)]
    match = re.fullmatch(rf"Who has the ({THING})\? ([A-Z][a-z]+) has the ({THING})\.", line)
    assert match[1] == match[3] and match[2] == (held[match[1]] if match[1] in held else "Nobody") and match[1] in {*lies, *held}
    return [3, len(lies) + len(held)]


def test_the_state_is_tracked_truly_and_every_choice_is_paid_for():
    """A reader that shares no code with the town agrees about every event, every answer and every probability."""
    answers = 0
    for seed in range(3):
        for story in drawn(seed, 300):
            log_p, checked = read_along(story.text)
            assert log_p == pytest.approx(story.log_p, abs=1e-10)
            answers += checked
    assert answers > 1_200


def test_the_reader_of_the_test_is_no_rubber_stamp():
    for story in drawn(9, 200):
        wrong = re.sub(r"(\? .* is in the )([a-z]+)", lambda m: m[1] + town.PLACES[town.PLACES.index(m[2]) - 1], story.text)
        wrong = re.sub(r"\? [A-Z]\w+ has", "? Somebody has", wrong)
        with pytest.raises(AssertionError):
            read_along(wrong)


# ---- told = read, and only one reading ----

@pytest.mark.parametrize("seed", range(5))
def test_the_probability_told_is_the_probability_read_and_there_is_one_reading(seed):
    for story in drawn(f"read {seed}", 5):
        readings = town._readings(story.text)
        assert len(readings) == 1 and readings[0] == pytest.approx(story.log_p, abs=1e-10)


HAND = ("Today, Anna is in the bank and Ben is in the mill.\nThere is a red key in the bank.\nAnna takes the red key.\n"
        "Where is the red key? The red key is in the bank.\n\n")


def test_a_probability_by_hand():
    opening, people = 1 / 4, 1 / 2 * (1 / 24 * 1 / 16) * (1 / 23 * 1 / 16)
    things = 1 / 2 * (1 / 6 * 1 / 20 * 1 / 2)                  # one of two numbers; colour, noun, one of two places
    event = 1 / 2 * 1 * 1 / 2 * 1 / 4                          # to move or to take; one way; one of two verbs; and no more
    question = 1 / 3 * 1 * 1 / 2                               # its kind, the only thing, and no second one
    assert town.log_probability(HAND) == pytest.approx(math.log(opening * people * things * event * question), abs=1e-12)


TWO = HAND.replace("Ben is in the mill", "Ben is in the bank")            # both in one place


@pytest.mark.parametrize("text", [
    TWO,
    TWO.replace("Anna takes", "Ben picks up"),
    TWO.replace("the red key.\nWhere", "the red key.\nAnna gives the red key to Ben.\nBen goes to the barn.\nWhere").replace("is in the bank.\n\n", "is in the barn.\n\n"),
    HAND.replace("Where is the red key? The red key is in the bank.", "Who has the red key? Anna has the red key."),
    HAND.replace("Anna takes the red key", "Ben runs to the tower").replace("Where is the red key? The red key is in the bank.", "Who has the red key? Nobody has the red key."),
    HAND[:-1] + "Where is Ben? Ben is in the mill.\n\n",
], ids=["together", "the other takes", "given and carried", "who", "nobody", "two questions"])
def test_what_can_be_has_one_reading(text):
    assert text != HAND and len(town._readings(text)) == 1
    assert town.log_probability(text) == pytest.approx(read_along(text)[0], abs=1e-12)


IMPOSSIBLE = {
    "a wrong answer": HAND.replace("The red key is in the bank", "The red key is in the mill"),
    "an answer about something else": HAND.replace("The red key is", "Anna is"),
    "Nobody, though Anna has it": HAND.replace("Where is the red key? The red key is in the bank.", "Who has the red key? Nobody has the red key."),
    "taking what is elsewhere": HAND.replace("Anna takes", "Ben takes"),
    "taking what is held": HAND.replace("takes the red key.\n", "takes the red key.\nAnna takes the red key.\n"),
    "dropping what is not held": HAND.replace("Anna takes", "Anna drops"),
    "giving what is not held": TWO.replace("Anna takes the red key", "Anna gives the red key to Ben"),
    "giving to somebody who is not there": HAND.replace("key.\nWhere", "key.\nAnna gives the red key to Ben.\nWhere"),
    "giving to oneself": HAND.replace("key.\nWhere", "key.\nAnna gives the red key to Anna.\nWhere"),
    "going to where one is": HAND.replace("Anna takes the red key", "Anna goes to the bank"),
    "a stranger acts": HAND.replace("Anna takes", "Carla takes"),
    "an unknown name": HAND.replace("Ben", "Benjamin"),
    "an unknown place": HAND.replace("mill", "moon"),
    "an unknown thing": HAND.replace("key", "sword"),
    "an unknown colour": HAND.replace("red", "pink"),
    "an unknown verb": HAND.replace("takes", "steals"),
    "one person twice": HAND.replace("Ben is in the mill", "Anna is in the mill"),
    "one person": HAND.replace(" and Ben is in the mill", ""),
    "no thing": "Today, Anna is in the bank and Ben is in the mill.\nAnna goes to the mill.\nWhere is Anna? Anna is in the mill.\n\n",
    "two things of one kind": HAND.replace("bank.\nAnna", "bank.\nThere is a blue key in the bank.\nAnna"),
    "a thing where nobody is": HAND.replace("key in the bank", "key in the barn"),
    "nothing happens": HAND.replace("Anna takes the red key.\n", ""),
    "eight events": HAND.replace("Anna takes the red key.\n", "Anna takes the red key.\nAnna drops the red key.\n" * 4),
    "no question": HAND.replace("Where is the red key? The red key is in the bank.\n", ""),
    "three questions": HAND[:-1] + "Where is Ben? Ben is in the mill.\n" * 2 + "\n",
    "an event after the question": HAND[:-1] + "Anna goes to the barn.\n\n",
    "the end is missing": HAND[:-1],
    "half of it": HAND[:len(HAND) // 2],
    "text after the end": HAND + "Today",
    "two stories": HAND + HAND,
    "text before the beginning": " " + HAND,
    "a capital too few": HAND.lower(),
    "nothing at all": "",
}


@pytest.fixture
def hamlet(monkeypatch):
    """The same rules with fewer words: searched twenty times faster."""
    for name, few in {"PEOPLE": "Anna Ben Carla", "PLACES": "bank barn mill", "THINGS": "bell key", "COLOURS": "blue red"}.items():
        monkeypatch.setattr(town, name, tuple(few.split()))


@pytest.mark.parametrize("text", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_story_has_no_reading(text, hamlet):
    assert text != HAND and town.log_probability(text) is None


def test_in_the_hamlet_the_possible_is_possible(hamlet):
    assert len(town._readings(HAND)) == len(town._readings(TWO)) == 1


def test_no_story_is_the_beginning_of_another():
    """The empty line ends a story and stands nowhere else: its end is in the text, and costs nothing."""
    for story in drawn(4, 500):
        assert story.text.endswith("\n\n") and story.text.count("\n\n") == 1 and story.text.isascii()


def test_a_choice_that_leaves_no_trace_is_noticed(monkeypatch):
    """Two verbs spelt alike: the probability of one telling is half of that of the text, and the floor would be too high."""
    text = HAND.replace("Anna takes the red key", "Ben runs to the tower")
    before = town._readings(text)
    monkeypatch.setattr(town, "MOVES", ("runs to", "walks to", "runs to"))
    assert len(before) == 1 and town._readings(text) == pytest.approx(before * 2)
    with pytest.raises(AssertionError, match="two sequences of choices"):
        town.log_probability(text)


# ---- the probabilities themselves ----

class Watching(town._Narrator):
    """Looks at every choice it is offered."""
    seen = 0

    def choose(self, options, weights=None):
        shares = weights or [1 / len(options)] * len(options)
        assert len(options) == len(shares) == len(set(options)) and min(shares) > 0
        assert sum(shares) == pytest.approx(1, abs=1e-12)
        before = self.log_p
        chosen = super().choose(options, weights)
        assert chosen in options and self.log_p - before == pytest.approx(math.log(shares[options.index(chosen)]), abs=1e-12)
        Watching.seen += 1
        return chosen


def test_at_every_point_the_options_differ_and_their_probabilities_sum_to_1():
    Watching.seen = 0
    for number in range(100):
        narrator, story = Watching(random.Random(f"watched/{number}")), town.tell(random.Random(f"watched/{number}"))
        town._story(narrator)
        assert "".join(narrator.text) == story.text and narrator.log_p == story.log_p
    assert Watching.seen > 100 * 20


@pytest.mark.parametrize("weights", [None, (0.5, 0.25, 0.125, 0.125)])
def test_a_choice_falls_as_often_as_its_probability_says(weights):
    narrator = town._Narrator(random.Random(0))
    counts = np.bincount([narrator.choose(range(4), weights) for _ in range(8_000)])
    expected = 8_000 * np.array(weights or [0.25] * 4)
    assert ((counts - expected) ** 2 / expected).sum() < 16.3            # chi-square, 3 degrees, 0.001


def test_the_ends_of_the_random_numbers_stay_inside():
    class Dial:
        def __init__(self, a):
            self.random = lambda: a

    for n in (1, 3, 7, 10, 24):                                          # ten times 1/10 add up to less than 1
        assert town._Narrator(Dial(0.0)).choose(range(n)) == 0 and town._Narrator(Dial(1 - 2 ** -53)).choose(range(n)) == n - 1
    for a in (0.0, 1 - 2 ** -53):
        story = town.tell(Dial(a))
        assert read_along(story.text)[0] == pytest.approx(story.log_p)


# ---- the entropy: the mean of -log p against a calculation that draws nothing ----

def renamed(people, things):
    """A state up to the names of its places: what can happen does not depend on them."""
    names = {}
    return (tuple(names.setdefault(place, len(names)) for place in people),
            tuple((kind, x if kind == "held" else names.setdefault(x, len(names))) for kind, x in things))


def put(row, i, value):
    return row[:i] + (value,) + row[i + 1:]


@functools.lru_cache(None)
def bits_of_events(state, done):
    """Entropy of all events from here on. state: (place of each person, ("lies", place) or ("held", person) of each thing)."""
    people, things = state
    everybody = range(len(people))
    takes = [(p, t) for p in everybody for t in range(len(things)) if things[t] == ("lies", people[p])]
    drops = [t for t, (kind, _) in enumerate(things) if kind == "held"]
    gives = [(t, other) for t in drops for other in everybody if other != things[t][1] and people[other] == people[things[t][1]]]
    ways = [3 * 15 * len(people), 2 * len(takes), 2 * len(drops), len(gives)]
    kinds = sum(map(bool, ways))
    bits = math.log2(kinds) + sum(math.log2(n) for n in ways if n) / kinds
    if done == 6:
        return bits
    known = {*people, *(x for kind, x in things if kind == "lies")}
    after = [(1 / len(people) / 15, put(people, p, place), things) for p in everybody for place in known - {people[p]}]
    after += [((16 - len(known)) / len(people) / 15, put(people, p, "a new place"), things) for p in everybody]
    after += [(1 / len(takes), people, put(things, t, ("held", p))) for p, t in takes]
    after += [(1 / len(drops), people, put(things, t, ("lies", people[things[t][1]]))) for t in drops]
    after += [(1 / len(gives), people, put(things, t, ("held", other))) for t, other in gives]
    assert sum(share for share, *_ in after) == pytest.approx(kinds)
    more = -0.75 * math.log2(0.75) - 0.25 * math.log2(0.25)
    return bits + more + 0.75 / kinds * sum(share * bits_of_events(renamed(*next), done + 1) for share, *next in after)


def entropy_in_bits():
    """Of one story, exactly: by the chain rule, the expected entropy of each choice, over all that can come before it."""
    total = 2 + 1 + 1 + 1                                                # opening, how many people, things and questions
    for n, m in itertools.product((2, 3), (1, 2)):
        total += (sum(math.log2(24 - i) + math.log2(16) for i in range(n)) + sum(math.log2(6) + math.log2(20 - j) for j in range(m))
                  + 1.5 * (math.log2(3) + math.log2(n) / 3 + math.log2(m) * 2 / 3)) / 4
        for others in itertools.product(range(16), repeat=n - 1):        # the first person's place may be called 0
            places = sorted({0, *others})
            total += m * math.log2(len(places)) / 4 / 16 ** (n - 1)
            for lies in itertools.product(places, repeat=m):
                state = renamed((0, *others), tuple(("lies", place) for place in lies))
                total += bits_of_events(state, 0) / len(places) ** m / 4 / 16 ** (n - 1)
    return total


def test_the_mean_of_minus_log_p_is_the_entropy():
    exact = entropy_in_bits()
    assert exact == pytest.approx(62.8712, abs=1e-4)                     # the number on the page
    bits = np.array([-story.log_p for story in drawn("entropy", 2_000)]) / math.log(2)
    assert 14 < bits.std() < 16 and abs(bits.mean() - exact) < 4 * bits.std() / math.sqrt(len(bits))


# ---- the streams ----

def first(n, seed, **options):
    return [story.text for story in itertools.islice(town.stories(seed, **options), n)]


def test_streams_are_reproducible_and_depend_on_the_seed():
    texts = first(100, 0)
    assert texts == first(100, 0) and first(5, 0, held_out=True) == first(5, 0, held_out=True)
    assert not set(texts) & set(first(100, 1)) and len(set(texts)) == 100
    golden = hashlib.sha256("".join(texts).encode()).hexdigest()
    assert golden.startswith("2d32d6dcf5bd353b"), "other stories than before: every floor and every loss that was published is void"


def test_training_and_held_out_never_share_a_text():
    train, held = set(), set()
    for seed in (0, 1, 2):
        train |= set(first(300, seed))
        held |= set(first(20, seed, held_out=True))
    assert len(train) == 900 and len(held) == 60 and not train & held
    assert all(map(town.is_held_out, held)) and not any(map(town.is_held_out, train))


def test_the_two_sides_are_all_the_stories_about_one_to_fifteen():
    texts = [story.text for story in drawn(0, 800)]
    held = [text for text in texts if town.is_held_out(text)]
    assert abs(len(held) - 50) < 4 * math.sqrt(800 / 16 * 15 / 16)
    assert first(len(held), 0, held_out=True) == held
    assert first(800 - len(held), 0) == [text for text in texts if not town.is_held_out(text)]


def test_the_side_is_a_checksum_that_any_program_can_compute():
    def crc32(data):                                                     # bit by bit, from its polynomial
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
        return crc ^ 0xFFFFFFFF

    assert [town.is_held_out(text) for text in first(40, 3) + first(5, 3, held_out=True)] == [False] * 40 + [True] * 5
    assert all(town.is_held_out(str(n)) == (crc32(str(n).encode()) % 16 == 0) for n in range(300))


@pytest.mark.parametrize("n_bytes", [0, 1, 1_000, 20_000])
def test_text_of_takes_as_many_stories_as_it_needs(n_bytes):
    texts = town.text_of(0, n_bytes)
    sizes = [len(text.encode()) for text in texts]
    assert sum(sizes) >= n_bytes and sum(sizes[:-1]) < max(n_bytes, 1)
    assert texts == first(len(texts), 0)
