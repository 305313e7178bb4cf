"""The budget of a run: nothing is sent that could take what all its jobs spend together past it.

The ledger (work/<run>/spending.json) says of each journal what its jobs have spent, and what its batches on their way may cost:

    {"journal/ratings.jsonl": {"spent": dollars, "batches": {our name: dollars}}}

An entry grows before the money is spent: it is never less than what the endpoint may bill, wherever a job is killed. So
after a kill it holds, besides what was spent, what was in flight at its most (up to twice that), and keeps it.
"""

import asyncio
import fcntl
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson

from psychocounsel.errors import UserError
from psychocounsel.journal import tokens_of
from psychocounsel.pricing import cost, list_price

CODE_VERSION = 1  # no result depends on what may be spent

TINY = 1e-9  # dollars: less than sums of floats are off by


class OutOfBudget(UserError):
    """The next request could pass the budget."""


class Purse:
    """What the requests of one journal may cost: taken from the run's budget before they are sent, settled when they are answered."""

    def __init__(self, ledger: Path, journal: Path, price: dict, budget: float | None, longest_answer: int, batch: bool) -> None:
        self.ledger, self.price, self.budget, self.longest_answer = ledger, price, budget, longest_answer
        self.share = price.get("batch", 1) if batch else 1
        self.entry = os.path.relpath(journal.resolve(), ledger.resolve().parent)
        self.in_flight, self.change = 0.0, asyncio.Event()
        with self.entries() as entries:
            if self.entry not in entries:  # a journal from before the ledger
                entries[self.entry] = {"spent": cost(price, tokens_of(journal)), "batches": {}}
            self.spent = self.granted = entries[self.entry]["spent"]

    def __enter__(self) -> "Purse":
        return self

    def __exit__(self, *_: object) -> None:
        with self.entries() as entries:
            entries[self.entry]["spent"] = self.spent + self.in_flight

    @contextmanager
    def entries(self) -> Iterator[dict]:
        """Give the ledger's entries, locked, and bring what is changed to the disk as a whole."""
        self.ledger.parent.mkdir(parents=True, exist_ok=True)
        with open(self.ledger.with_name(f".{self.ledger.name}.lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = read_ledger(self.ledger)
            yield entries
            part = self.ledger.with_name(f".{self.ledger.name}.part")
            with open(part, "wb") as file:
                file.write(orjson.dumps(entries, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.ledger)

    def at_most(self, size: int) -> float:
        """Return the most that a request of so many bytes may cost: no token is less than a byte of what is sent."""
        prices = (self.price["input"], self.price["cached_input"] or 0)
        return self.share * (size * max(prices) + self.longest_answer * self.price["output"]) / 1_000_000

    def price_of(self, tokens: dict) -> float:
        """Return what tokens cost."""
        return self.share * list_price(self.price, tokens)

    def exhausted(self, dollars: float) -> OutOfBudget:
        """Return the fault that a request which may cost so much would pass the budget."""
        spent = total(read_ledger(self.ledger)) - self.granted + self.spent
        return OutOfBudget(
            f"the budget of ${self.budget:,.2f} is used up: ${spent:,.4f} are spent or on their way in this run ({self.ledger}),"
            f" and the next request may cost up to ${dollars:,.4f}."
        )

    # One by one

    async def take(self, dollars: float) -> None:
        """Take what a request may cost; wait where the answers in flight may leave it over; raise OutOfBudget where none is."""
        while not self.allows(dollars):
            if not self.in_flight:
                raise self.exhausted(dollars)
            self.change.clear()
            await self.change.wait()
        self.in_flight += dollars

    def allows(self, dollars: float) -> bool:
        """Say whether the budget allows a request in flight more; if so, the ledger has it."""
        need = self.spent + self.in_flight + dollars
        if need <= self.granted:
            return True
        with self.entries() as entries:
            others = total(entries) - entries[self.entry]["spent"]
            most = math.inf if self.budget is None else self.budget - others
            if need > most + TINY:
                return False
            self.granted = min(max(most, need), need + self.in_flight + dollars)  # ahead, so as not to write for every request
            entries[self.entry]["spent"] = self.granted
        return True

    def settle(self, taken: float, spent: float) -> None:
        """Give back what was taken for a request, but for what it cost."""
        self.in_flight = max(0.0, self.in_flight - taken) if self.in_flight - taken > TINY else 0.0
        self.spent += spent
        self.change.set()

    # In batches

    def room(self) -> float:
        """Return what the run may still spend."""
        return math.inf if self.budget is None else self.budget - total(read_ledger(self.ledger))

    def take_batch(self, name: str, dollars: float) -> None:
        """Take what a batch may cost; raise OutOfBudget where that is more than is left."""
        with self.entries() as entries:
            if self.budget is not None and total(entries) + dollars > self.budget + TINY:
                raise self.exhausted(dollars)
            entries[self.entry]["batches"][name] = dollars

    def settle_batch(self, name: str, spent: float) -> None:
        """Give back what was taken for a batch, but for what it cost; once: a second time changes nothing."""
        with self.entries() as entries:
            if entries[self.entry]["batches"].pop(name, None) is not None:
                self.spent, self.granted = self.spent + spent, self.granted + spent
                entries[self.entry]["spent"] += spent

    def keep_batches(self, names: set[str]) -> None:
        """Give back what was taken for batches other than these: a job was killed before it intended them."""
        with self.entries() as entries:
            batches = entries[self.entry]["batches"]
            entries[self.entry]["batches"] = {name: dollars for name, dollars in batches.items() if name in names}


def read_ledger(path: Path) -> dict:
    """Return the entries of a ledger; none of one that is not there."""
    try:
        return orjson.loads(path.read_bytes()) if path.is_file() else {}
    except orjson.JSONDecodeError:
        raise UserError(f"{path}: damaged. Move it away: what the journals hold is counted again, what was lost in flight is not") from None


def total(entries: dict) -> float:
    """Return the dollars of all entries."""
    return sum(entry["spent"] + sum(entry["batches"].values()) for entry in entries.values())
