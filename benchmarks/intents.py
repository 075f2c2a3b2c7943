"""A 20-way intent task, made from templates and slots; the test texts have phrasings that no other text has.

    python benchmarks/intents.py -o FOLDER [--train 2000 --unlabeled 1000 --test 500]

Writes intents_train.json, intents_unlabeled.json and intents_test.json: lists of objects with text and label. Intents
share words and slots, some come in near pairs (to cancel or to change an order), and a text can start with small talk
of any other subject, so that single words do not decide.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from common import write_json

SLOTS = {
    "item": ("a blue jacket", "the desk lamp", "two paperbacks", "my running shoes", "the coffee maker", "a phone case",
             "the garden chairs", "a winter coat", "the kettle", "those headphones", "a birthday card", "the tent"),
    "person": ("my sister", "Tom", "Dr. Alvarez", "the landlord", "Priya", "my manager", "grandma", "the plumber",
               "Mrs. Chen", "our accountant", "Noah", "the neighbors"),
    "place": ("Lisbon", "the office", "Denver", "the train station", "home", "Osaka", "the north branch", "Main Street",
              "the airport", "Leeds", "the clinic", "Cape Town"),
    "time": ("tomorrow morning", "on Friday", "next week", "at half past six", "tonight", "on the ninth", "at noon",
             "this weekend", "in two hours", "by the end of the month", "on Monday evening", "later today"),
    "sum": ("forty dollars", "the rent", "120 euros", "a small amount", "25 pounds", "last month's bill", "300 dollars",
            "the deposit", "15 euros", "half of it", "ninety pounds", "the full amount"),
    "number": ("order 4471", "number 88-203", "reference K19", "order 9050", "number 31-770", "reference Z4",
               "order 1288", "number 60-014", "reference B77", "order 3306", "number 12-945", "reference M2"),
}  # fmt: skip
OPENINGS = (
    "", "", "", "hi, ", "hello there, ", "sorry to bother you, ", "quick question: ", "thanks for last time, now ",
    "it has been a long day, ", "as I said on the phone, ", "the weather is awful here, ",
    "my train is late again, so ", "I already paid for it, ", "I moved last year, ", "my card is new, ",
    "I like your shop, ",
)  # fmt: skip
CLOSINGS = (
    "", "", "", " please", ", thanks", ", if you can", ", it matters to me", " and let me know", ", no rush",
    ", the sooner the better", ", I am at home now", ", my order came yesterday",
)  # fmt: skip
INTENTS = {
    "cancel_order": (
        "cancel {number}|I no longer want {item}, stop the order|do not send {number} after all|call off {number}"
        "|please void my purchase of {item}|take {item} out of processing, I changed my mind"
        "|I need {number} withdrawn before it ships",
        "forget about {item}, I will not be buying it|scrap {number}|can my purchase of {item} still be stopped",
    ),
    "change_order": (
        "swap {item} for another size in {number}|add {item} to {number}|make it two instead of one in {number}"
        "|can {number} have {item} as well|edit {number}, the color is wrong|replace one thing in {number} by {item}"
        "|I would like {number} to include {item}",
        "put {item} into {number} too|{number} should be amended|could you alter what is in {number}",
    ),
    "track_order": (
        "where is {number}|has {item} shipped yet|when does {number} arrive|what is the status of {number}"
        "|is {item} on its way|show me how far {number} has come|I am still waiting for {item}, where did it go",
        "any news on {number}|how long until {item} gets here|has {number} left the warehouse",
    ),
    "return_item": (
        "I want to send {item} back|how do I return {item}|{item} does not fit, I will give it back"
        "|start a return for {number}|may I bring {item} back to the shop|get me a return label for {item}"
        "|{item} is not for me, take it back",
        "what do I do to hand {item} back to you|I am not keeping {item}|is there a form to ship {item} back",
    ),
    "ask_refund": (
        "I want my money back for {item}|refund {number}|when do I get {sum} back|you still owe me {sum} for {number}"
        "|reimburse me for {item}|give me back what I paid for {item}|the refund of {sum} has not come",
        "pay me back for {number}|how soon will {sum} be returned to my account|I expect to be compensated for {item}",
    ),
    "report_damage": (
        "{item} came broken|there is a crack in {item}|{item} arrived with a part missing|{number} was damaged"
        "|the box of {item} was crushed|{item} stopped working after a day|I found scratches all over {item}",
        "{item} fell apart when I opened it|something is wrong with {item}, it rattles|{number} reached me in pieces",
    ),
    "send_money": (
        "transfer {sum} to {person}|send {sum} to {person} {time}|pay {person} {sum}|move {sum} over to {person}"
        "|wire {sum} to {person}|I owe {person} {sum}, settle it|let {person} have {sum} from my account",
        "{person} should get {sum} from me|make a payment of {sum} to {person}|give {person} {sum} {time}",
    ),
    "request_money": (
        "ask {person} for {sum}|{person} owes me {sum}, remind them|request {sum} from {person}"
        "|send {person} a bill for {sum}|collect {sum} from {person}|tell {person} to pay me {sum}"
        "|I need {sum} from {person} {time}",
        "get {sum} back from {person}|let {person} know that I am waiting for {sum}|charge {person} {sum} for me",
    ),
    "check_balance": (
        "how much is in my account|what is my balance|do I have enough for {sum}|show me what is left this month"
        "|can I afford {sum} right now|how much money do I have|tell me what my savings come to",
        "is there {sum} left to spend|what does my account stand at|am I overdrawn",
    ),
    "block_card": (
        "my card was stolen, block it|freeze my card|I lost my card at {place}|stop all payments with my card"
        "|somebody else has my card, lock it|disable my card until {time}|I left my card in {place}, shut it off",
        "my wallet is gone, make the card useless|nobody must be able to pay with my card|put my card on hold",
    ),
    "new_card": (
        "order a new card for me|my card expires, send another|I would like a second card for {person}"
        "|the chip of my card is worn, replace it|get me a fresh card|when will the replacement card come"
        "|my old card is cut up, I need one",
        "issue a card to {person} too|I want a card with another design|mail me a substitute for my bent card",
    ),
    "book_trip": (
        "book a seat to {place} {time}|I need a ticket to {place}|find me a way to {place} {time}"
        "|reserve a train to {place}|get {person} and me to {place} {time}|buy two tickets to {place}"
        "|I want to travel to {place} {time}",
        "secure me a place on the coach to {place}|take me from {place} to the coast {time}|we want to fly out {time}",
    ),
    "cancel_trip": (
        "cancel my seat to {place}|I am not going to {place} after all|drop the trip {time}"
        "|call off our journey to {place}|I cannot travel {time}, cancel the ticket|give up my ticket to {place}"
        "|delete the booking to {place}",
        "the trip to {place} is off|release my seat {time}|{person} and I will not take the train to {place}",
    ),
    "change_trip": (
        "move my trip to {place} to {time}|can I take a later train to {place}|change the date of my ticket"
        "|rebook me {time}|switch the seat to {place} to first class|push my journey back, I can only go {time}"
        "|I need to leave for {place} earlier",
        "is another departure to {place} possible|put me on a different coach {time}|shift the trip by a day",
    ),
    "set_reminder": (
        "remind me to call {person} {time}|set a reminder for {sum} {time}|do not let me forget {item} {time}"
        "|tell me {time} that I must see {person}|put a note for {time}: buy {item}|nudge me {time} about {person}"
        "|I must not miss {person} {time}, remind me",
        "make sure I think of {item} {time}|jog my memory {time} about {sum}|ping me {time}, {person} has a birthday",
    ),
    "plan_meeting": (
        "set up a meeting with {person} {time}|find a slot for {person} and me|invite {person} {time}"
        "|schedule a call with {person} {time}|put {person} in my calendar {time}|arrange to meet {person} in {place}"
        "|when are {person} and I both free",
        "I have to sit down with {person} {time}|get {person} and me together in {place}|block an hour for {person}",
    ),
    "find_way": (
        "how do I get to {place}|what is the fastest way to {place}|show me the route to {place}"
        "|how far is {place} from here|is there a bus to {place}|which road leads to {place}|navigate to {place}",
        "guide me to {place}|I am lost, where is {place}|how long is the walk to {place}",
    ),
    "opening_hours": (
        "when do you open {time}|is {place} open {time}|how late can I come {time}|what are your hours"
        "|do you close early {time}|at what time does {place} shut|are you there on holidays",
        "until when can I drop in|will anyone be at {place} {time}|which days is {place} closed",
    ),
    "change_address": (
        "I moved to {place}, update my address|my new address is in {place}|change where my mail goes"
        "|use {place} as my address from now on|my details are old, I am in {place} now|correct the street you have"
        "|send everything to {place} {time} on",
        "I have a new home in {place}|please note that I reside in {place}|the number of the building is wrong",
    ),
    "speak_to_human": (
        "let me talk to a person|I want a real agent|connect me with {person} from support|is anybody there"
        "|put me through to someone|stop the bot, I need a human|can an employee call me {time}",
        "give me someone who can decide|I would rather speak with your staff|have a colleague ring me {time}",
    ),
}
"""Intent -> templates of training and unlabeled texts, and those of test texts."""


def phrasings(intent: str, part: int) -> list[str]:
    """Return the templates of an intent; see `make`."""
    known, tested = (text.split("|") for text in INTENTS[intent])
    return (known, tested, known[:-2], known[-2:])[part]


def make(count: int, part: int, seed: int) -> list[dict[str, str]]:
    """Return different texts with their intents, all intents equally often.

    Args:
        count: Number of texts.
        part: 0 for the phrasings of training, 1 for those of the test. To choose settings by: 2 for all phrasings of
            training but the last two, 3 for these two.
        seed: Random seed.
    """
    source, seen, made = random.Random(seed), set(), []
    names = list(INTENTS)
    while len(made) < count:
        intent = names[len(made) % len(names)]
        text = source.choice(phrasings(intent, part))
        for slot, values in SLOTS.items():
            text = text.replace(f"{{{slot}}}", source.choice(values))
        text = f"{source.choice(OPENINGS)}{text}{source.choice(CLOSINGS)}"
        if text not in seen:
            seen.add(text)
            made.append({"text": text, "label": intent})
    source.shuffle(made)
    return made


def write(folder: Path, *, train: int, unlabeled: int, test: int, seed: int = 0) -> None:
    """Write the three files; training and unlabeled texts are different ones."""
    known = make(train + unlabeled, 0, seed)
    write_json(folder / "intents_train.json", known[:train])
    write_json(folder / "intents_unlabeled.json", known[train:])
    write_json(folder / "intents_test.json", make(test, 1, seed + 1))


def main() -> None:
    """Read the arguments and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True, type=Path)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--unlabeled", type=int, default=1000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.output, train=args.train, unlabeled=args.unlabeled, test=args.test, seed=args.seed)


if __name__ == "__main__":
    main()
