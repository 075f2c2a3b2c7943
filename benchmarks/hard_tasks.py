"""Six small tasks whose answers a backbone cannot guess, as conversations, each with a rule that judges an answer.

``intents``: a code for what a customer wants, one of 20. ``tools``: a tool call as JSON; no prompt names the tools.
``sql``: a query on two tables, judged by the rows that it returns. ``dialect``: English in an invented grammar.
``persona``: a form of address and a count of the turns, kept over several turns. ``chains``: a solution in steps,
judged by the last number. Test items of the first three have wordings that no training item has.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import intents

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class HardTask:
    """A task.

    Attributes:
        make: Number of conversations, whether in the wordings of the test, seed -> conversations.
        right: Answer, conversation -> whether the answer is right.
        length: Tokens of an answer at most.
    """

    make: Callable[[int, bool, int], list[Messages]]
    right: Callable[[str, Messages], bool]
    length: int


def said(system: str | None, *texts: str) -> Messages:
    """Return a conversation: a system prompt, and turns of user and assistant."""
    start = [{"role": "system", "content": system}] if system else []
    return [*start, *({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts))]


def exact(answer: str, item: Messages) -> bool:
    """Return whether an answer is the reference."""
    return answer.strip() == item[-1]["content"]


def drawn(count: int, seed: int, one: Callable[[random.Random], Messages]) -> list[Messages]:
    """Return different conversations."""
    source, made = random.Random(seed), {}
    while len(made) < count:
        item = one(source)
        made.setdefault(json.dumps(item[:-1]), item)
    return list(made.values())


def make_intents(count: int, test: bool, seed: int) -> list[Messages]:
    """Return customers' sentences with the code of their intent."""
    codes = dict(zip(intents.INTENTS, random.Random(7).sample(range(100, 1000), len(intents.INTENTS)), strict=True))
    read = intents.make(count, int(test), seed)
    return [said("You route the calls of a shop.", one["text"], f"K{codes[one['label']]}") for one in read]


TOOLS = (
    ("timer_start", "set a timer of {n} minutes for the {thing}|the {thing} needs {n} minutes, tell me when",
     "count down {n} minutes, the {thing} is on|give me a signal for the {thing} in {n} minutes"
     "|in {n} minutes I take the {thing} off, ring then", {"minutes": "n", "label": "thing"}),
    ("lamp_level", "put the lamp in the {room} at {n} percent|make the {room} light {n} percent",
     "I want {n} percent of light in the {room}|dim the {room} to {n} percent"
     "|the {room} lamp: {n} percent, please", {"room": "room", "percent": "n"}),
    ("list_push", "add {n} {things} to the shopping list|we need {n} {things}, write it down",
     "note {n} {things} for the shop|do not let me forget to buy {n} {things}"
     "|{n} {things} are missing, I go shopping later", {"item": "things", "count": "n"}),
    ("heat_hold", "keep the {room} at {n} degrees|heat the {room} to {n} degrees",
     "I would like {n} degrees in the {room}|make it {n} degrees warm in the {room}"
     "|the {room} should stay at {n} degrees", {"zone": "room", "celsius": "n"}),
    ("mail_draft", "write to {name} that I come at {n}|draft a mail to {name}: I arrive at {n}",
     "let {name} know by mail that I am there at {n}|mail {name}: expect me at {n}"
     "|{name} should read in a message that I turn up at {n}", {"to": "name", "hour": "n"}),
    ("play_from", "play {band}, starting at track {n}|put on {band} from song {n}",
     "I feel like {band}, skip to number {n}|let me hear {band}, track {n} first"
     "|music by {band}, please, from track {n}", {"artist": "band", "track": "n"}),
)  # fmt: skip
"""Name of a tool, wordings of training, wordings of test, and argument -> slot."""
SLOTS = {
    "thing": ("pasta", "bread", "eggs", "rice", "tea", "roast", "soup", "cake"),
    "room": ("kitchen", "hall", "bedroom", "office", "cellar", "attic", "bathroom"),
    "things": ("apples", "lemons", "onions", "candles", "batteries", "rolls", "carrots"),
    "name": ("Ada", "Tom", "Priya", "Noah", "Grace", "Omar", "Lena", "Hugo"),
    "band": ("Queen", "Abba", "Blur", "Muse", "Toto", "Kraftwerk", "Oasis"),
}


def make_tools(count: int, test: bool, seed: int) -> list[Messages]:
    """Return requests with their tool calls."""

    def one(source: random.Random) -> Messages:
        name, train, other, wanted = source.choice(TOOLS)
        values: dict[str, object] = {slot: source.choice(known) for slot, known in SLOTS.items()}
        values["n"] = source.randint(2, 29)
        text = source.choice((other if test else train).split("|")).format(**values)
        call = {"tool": name, "arguments": {key: values[slot] for key, slot in wanted.items()}}
        return said("You run the devices of a house.", text, json.dumps(call))

    return drawn(count, seed, one)


def same_json(answer: str, item: Messages) -> bool:
    """Return whether an answer is the same JSON value as the reference."""
    try:
        return bool(json.loads(answer) == json.loads(item[-1]["content"]))
    except ValueError:
        return False


SCHEMA = "Tables: books(id, title, author, year, pages); loans(id, book_id, member, days)."
AUTHORS = ("Woolf", "Borges", "Achebe", "Lem", "Munro", "Calvino", "Szabo")
MEMBERS = ("Ada", "Tom", "Priya", "Noah", "Grace", "Omar")
QUERIES = (
    ("which books did {author} write|list the titles by {author}",
     "what is there by {author}|name the works of {author}|{author}: give me the titles",
     "SELECT title FROM books WHERE author = '{author}'"),
    ("how many books are from before {year}|count the books older than {year}",
     "what number of books predate {year}|books published earlier than {year}, how many"
     "|tell me the count of books that came out before {year}",
     "SELECT COUNT(*) FROM books WHERE year < {year}"),
    ("what has {member} borrowed|show the titles that {member} has on loan",
     "which books are with {member}|the titles lent to {member}|what is {member} reading from our shelves",
     "SELECT title FROM books JOIN loans ON books.id = loans.book_id WHERE member = '{member}'"),
    ("who keeps a book for more than {days} days|members with a loan over {days} days",
     "name those who have had a book longer than {days} days|whose loan lasts more than {days} days"
     "|which members exceed {days} days with a book",
     "SELECT member FROM loans WHERE days > {days}"),
    ("the longest book by {author}|which book of {author} has the most pages",
     "what is the thickest book by {author}|the {author} book with the highest page count"
     "|from {author}, the one with the most paper",
     "SELECT title FROM books WHERE author = '{author}' ORDER BY pages DESC LIMIT 1"),
    ("how many loans does {member} have|count the loans of {member}",
     "the number of books that {member} took out|in how many loans does {member} appear|loans by {member}, the total",
     "SELECT COUNT(*) FROM loans WHERE member = '{member}'"),
    ("average pages of books since {year}|how long are books from {year} on, on average",
     "the mean page count of books not older than {year}|books from {year} or later: their mean length"
     "|for books that appeared in {year} or after, average the pages",
     "SELECT AVG(pages) FROM books WHERE year >= {year}"),
)  # fmt: skip
"""Wordings of training, wordings of test, and query."""


def make_sql(count: int, test: bool, seed: int) -> list[Messages]:
    """Return questions on the two tables with their queries."""

    def one(source: random.Random) -> Messages:
        train, other, query = source.choice(QUERIES)
        values = {"author": source.choice(AUTHORS), "member": source.choice(MEMBERS)}
        values |= {"year": str(source.randint(1930, 2005)), "days": str(source.randint(3, 40))}
        text = source.choice((other if test else train).split("|")).format(**values)
        lead = source.choice(("", "", "please: ", "quick one, ", "for the report, ", "I wonder: "))
        return said(SCHEMA, lead + text, query.format(**values))

    return drawn(count, seed, one)


@cache
def library() -> sqlite3.Connection:
    """Return a database with the two tables, which refuses to write."""
    base, source = sqlite3.connect(":memory:"), random.Random(3)
    base.execute("CREATE TABLE books(id INTEGER, title TEXT, author TEXT, year INTEGER, pages INTEGER)")
    base.execute("CREATE TABLE loans(id INTEGER, book_id INTEGER, member TEXT, days INTEGER)")
    for number in range(120):
        row = (number, f"Book {number}", source.choice(AUTHORS), source.randint(1920, 2010), source.randint(80, 900))
        base.execute("INSERT INTO books VALUES (?, ?, ?, ?, ?)", row)
        loan = (number, source.randrange(120), source.choice(MEMBERS), source.randint(1, 45))
        base.execute("INSERT INTO loans VALUES (?, ?, ?, ?)", loan)
    base.execute("PRAGMA query_only = ON")
    return base


def same_rows(answer: str, item: Messages) -> bool:
    """Return whether a query returns the rows of the reference, in any order."""
    base = library()
    base.set_progress_handler(lambda: 1, 2_000_000)  # a join without a condition does not stop the study
    try:
        found, wanted = (base.execute(text).fetchall() for text in (answer, item[-1]["content"]))
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return False
    return sorted(map(repr, found)) == sorted(map(repr, wanted))


NOUNS = ("farmer", "teacher", "sailor", "child", "doctor", "baker", "painter", "dog", "cat", "horse", "wolf", "bird",
         "king", "nurse", "guest")  # fmt: skip
THINGS = ("boat", "lamp", "apple", "letter", "door", "stone", "basket", "coat", "bell", "map", "cake", "ladder")
ADJECTIVES = ("old", "small", "red", "quiet", "heavy", "clean", "tall", "strange")
VERBS = ("finds", "carries", "sees", "paints", "breaks", "sells", "hides", "wants", "moves", "cleans")
STEMS = ("find", "carry", "see", "paint", "break", "sell", "hide", "want", "move", "clean")
PLACES = ("house", "garden", "forest", "market", "harbor", "tower")


def make_dialect(count: int, test: bool, seed: int) -> list[Messages]:
    """Return sentences with their translations: no articles, adjective behind its noun, verb at the end, marked.

    ``test`` changes nothing: any two seeds give other sentences.
    """

    def one(source: random.Random) -> Messages:
        who, what, place = source.choice(NOUNS), source.choice(THINGS), source.choice(PLACES)
        first, second = source.choice(ADJECTIVES), source.choice(ADJECTIVES)
        number, never = source.randrange(len(VERBS)), source.random() < 0.4
        verb = f"never {VERBS[number]}" if never else VERBS[number]
        text = f"The {first} {who} {verb} a {second} {what} in the {place}."
        end = f"{STEMS[number]}-nu" if never else f"{STEMS[number]}-ko"
        return said("You translate for the islanders.", text, f"{who}-{first} {place}-wa {what}-{second} {end}.")

    return drawn(count, seed, one)


OPPOSITES = {"hot": "cold", "big": "small", "early": "late", "wet": "dry", "full": "empty", "soft": "hard",
             "high": "low", "fast": "slow"}  # fmt: skip


def make_persona(count: int, test: bool, seed: int) -> list[Messages]:
    """Return conversations of two to four exchanges; every answer has the name of the first turn and a count."""

    def one(source: random.Random) -> Messages:
        name = source.choice((*SLOTS["name"], "Mia", "Ivan", "Ruth", "Karim", "Elsa", "Paul"))
        hello = source.choice(("Hi, I am {}.", "Good day, my name is {}.", "{} here.", "This is {}."))
        texts = [hello.format(name), f"Aye, {name}. Log 1: signed on."]
        for turn in range(2, source.randint(2, 4) + 1):
            if source.random() < 0.5:
                left, right = source.randint(1, 9), source.randint(1, 9)
                asked, reply = f"What is {left} plus {right}?", str(left + right)
            else:
                asked = source.choice(list(OPPOSITES))
                asked, reply = f"What is the opposite of {asked}?", OPPOSITES[asked]
            texts += [asked, f"Aye, {name}. Log {turn}: {reply}."]
        return said("You keep the log of a ship.", *texts)

    return drawn(count, seed, one)


NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def same_number(answer: str, item: Messages) -> bool:
    """Return whether the last number of an answer is that of the reference."""
    found, wanted = (NUMBER.findall(text.replace(",", "")) for text in (answer, item[-1]["content"]))
    return bool(found) and bool(wanted) and float(found[-1]) == float(wanted[-1])


def chains_of(data: Path) -> HardTask:
    """Return the task of the solved problems in a folder of the LLM-Adapters collection."""

    def make(count: int, test: bool, seed: int) -> list[Messages]:
        read = json.loads((data / "math_data.json").read_text(encoding="utf-8"))
        read = [one for one in read if one["output"]][:-60]  # these are the other text
        part = read[-1000:] if test else read[:-1000]
        return [said(None, one["instruction"], one["output"]) for one in random.Random(seed).sample(part, count)]

    return HardTask(make, same_number, 128)


TASKS = {
    "intents": HardTask(make_intents, exact, 8),
    "tools": HardTask(make_tools, same_json, 48),
    "sql": HardTask(make_sql, same_rows, 48),
    "dialect": HardTask(make_dialect, exact, 40),
    "persona": HardTask(make_persona, exact, 24),
}
"""Name -> task, without ``chains``, which needs data."""
