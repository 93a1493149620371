"""Weighted grammars that write texts, know their entropy exactly, and read texts back.

A text is a row of independent weighted choices between the options of rules; only which rules come next, and how long a
recalled text is, depend on earlier choices. data/grammar.txt explains the notation. A `Grammar` can

- write a text, with integers only (`write`);
- compute the exact expected entropy and size of its texts (`measure`);
- find all derivations of a text, with their probabilities (`derivations`);
- prove that each text has a single derivation (`conflicts`), without which the entropy of the choices would not be the
  entropy of the texts.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import Any, NamedTuple

END = "\0"  # `$` in the notation

_PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself", "He": "She", "His": "Her"},
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself", "He": "He", "His": "His"},
}


class GrammarError(ValueError):
    """The grammar file is wrong; the message names rule and option."""


# -----------------------------------------------------------------------------------------------------------
# The grammar: rules, options, and the parts of an option's text. A part is a str, to be written as it is, or
# one of these.


class Choice(NamedTuple):
    """`<rule>` or `<rule:v>`: one of the rule's options, remembered as `bind` unless that is None."""

    rule: str
    bind: str | None


class Dispatch(NamedTuple):
    """`<v!col>` or `<v!col:w>`: one of the options of the rule that column `column` of `var` names."""

    var: str
    column: str
    bind: str | None


class Recall(NamedTuple):
    """`<v.col>` or `<v>`: a column of what `var` remembers; the column "" is the text written for it."""

    var: str
    column: str


# What a text remembers: a variable's option, and under `_written` of its name the text that was written for it.
Memory = dict[str, Any]


class Arithmetic(NamedTuple):
    """`<=a+b>`: the result of an operation on the columns "value" of two variables."""

    left: str
    operator: str
    right: str

    def text(self, left: Option, right: Option) -> str:
        a, b = left.value, right.value
        assert a is not None and b is not None, "the grammar was checked: both have a column `value`"
        return str(a + b if self.operator == "+" else a - b if self.operator == "-" else a * b)


class Option:
    """One option of a rule: its text in parts, its columns (each in parts), its column "value" as a number.

    `text` is the text if it is always the same, else None.
    """

    __slots__ = ("binds", "columns", "key", "parts", "text", "value", "weight")

    def __init__(self, key: str, weight: int, parts: tuple, columns: dict[str, tuple]):
        self.key, self.weight, self.parts, self.columns = key, weight, parts, columns
        self.text = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else None
        self.binds = any(getattr(part, "bind", None) for part in parts)
        self.value = int(columns["value"][0]) if "value" in columns else None


def _written(var: str) -> str:
    """The key under which a memory keeps the text written for a variable."""
    return f"{var}="


class Rule:
    """A weighted list of options; `table` has each option `weight` times."""

    __slots__ = ("entropy", "limit", "name", "options", "table", "total")

    def __init__(self, name: str, options: list[Option]):
        self.name, self.options = name, options
        self.table = [option for option in options for _ in range(option.weight)]
        self.total = len(self.table)
        self.limit = 2**32 - 2**32 % self.total  # draws from here on would favor the first options
        self.entropy = -math.fsum(self.probability(o) * math.log(self.probability(o)) for o in options)

    def probability(self, option: Option) -> float:
        return option.weight / self.total


_PART = re.compile(r"<([^<>]*)>")
_TAGS: list[tuple[re.Pattern, Callable]] = [
    (re.compile(r"=(\w)([-+*])(\w)"), lambda m: Arithmetic(*m.groups())),
    (re.compile(r"(\w)!(\w+)(?::(\w))?"), lambda m: Dispatch(*m.groups())),
    (re.compile(r"(\w)(?:\.(\w+))?"), lambda m: Recall(m[1], m[2] or "")),
    (re.compile(r"(\w\w+)(?::(\w))?"), lambda m: Choice(*m.groups())),
]


def _parts(text: str, where: str) -> tuple:
    """The parts of a text in the grammar's notation."""
    parts: list = []
    for index, piece in enumerate(_PART.split(text.replace("\\n", "\n").replace("$", END))):
        if index % 2 == 0:
            parts.extend([piece] if piece else [])
            continue
        for pattern, make in _TAGS:
            if found := pattern.fullmatch(piece):
                parts.append(make(found))
                break
        else:
            raise GrammarError(f"{where}: <{piece}> is not one of the notations that the file's head explains")
    return tuple(parts)


def _option(rule: str, names: list[str], line: str) -> Option:
    weight, text = re.findall(r"\A(?:(\d+)x(?: |$))?(.*)\Z", line.strip())[0]
    text, *cells = (cell.strip() for cell in text.split(" | "))
    where = f"rule {rule}, option {text!r}"
    if len(cells) != len(names):
        raise GrammarError(f"{where}: {len(cells)} columns, expected {len(names)}: {', '.join(names)}")
    columns = {name: _parts(cell, where) for name, cell in zip(names, cells)}
    if "she" in columns:
        columns.update({key: (value,) for key, value in _PRONOUNS[columns.pop("she")[0]].items()})
    parts = _parts(text, where)
    if not parts:
        raise GrammarError(f"{where}: an empty option cannot be read back")
    return Option(f"{rule}/{text}", int(weight or 1), parts, columns)


def read_grammar(text: str) -> dict[str, Rule]:
    """Rules from the grammar's notation. Raises GrammarError."""
    rules: dict[str, Rule] = {}
    name = ""
    names: list[str] = []
    options: list[Option] = []
    for line in [*text.splitlines(), "end_of_file"]:
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith(" "):
            options.append(_option(name, names, line))
            continue
        if options:
            rules[name] = Rule(name, options)
        head = re.fullmatch(r"(\w\w+)(?: \(([\w, ]+)\))?", line)
        if not head or head[1] in rules:
            raise GrammarError(f"{line!r}: a rule needs a name of its own, of two letters or more")
        name, names, options = head[1], (head[2] or "").replace(" ", "").split(",") if head[2] else [], []
    return rules


# -----------------------------------------------------------------------------------------------------------
# What is done with a grammar: write, measure, read


class Measure(NamedTuple):
    """Exact expectations of a text: its entropy in nats, and its bytes."""

    nats: float
    size_bytes: float


class Grammar:
    """Rules that can write documents, measure them without sampling, and read them back."""

    def __init__(self, rules: dict[str, Rule]):
        self.rules = rules
        self._measured: dict = {}

    # Writing ---------------------------------------------------------------------------------------------

    def write(self, parts: tuple, draw: Callable[[], int]) -> str:
        """One text, choosing with `draw`, which returns independent uniform integers below 2^32."""
        out: list[str] = []
        self._write(parts, {}, draw, out)
        return "".join(out)

    def _write(self, parts: tuple, memory: Memory, draw: Callable, out: list[str]) -> None:
        for part in parts:
            kind = part.__class__
            if kind is str:
                out.append(part)
            elif kind is Recall and part.column:
                self._write(memory[part.var].columns[part.column], memory, draw, out)
            elif kind is Recall:
                out.append(memory[_written(part.var)])
            elif kind is Arithmetic:
                out.append(part.text(memory[part.left], memory[part.right]))
            else:
                rule = self.rules[part.rule if kind is Choice else memory[part.var].columns[part.column][0]]
                number = draw()
                while number >= rule.limit:
                    number = draw()
                option = rule.table[number % rule.total]
                mark = len(out)
                # What an option's text binds is forgotten after it.
                self._write(option.parts, dict(memory) if option.binds else memory, draw, out)
                if part.bind:
                    memory[part.bind] = option
                    memory[_written(part.bind)] = "".join(out[mark:])

    # Measuring -------------------------------------------------------------------------------------------

    def measure(self, rule: str) -> Measure:
        """Exact expected entropy and size of a text of `rule`, which uses no variables bound outside."""
        return self._measure_rule(self.rules[rule], {})

    def _measure_rule(self, rule: Rule, memory: dict[str, tuple]) -> Measure:
        """`memory`: variable -> the options it may remember with their probabilities; all independent."""
        key = (rule.name, *sorted((var, id(beliefs)) for var, beliefs in memory.items()))
        if key not in self._measured:
            inner = [(rule.probability(o), self._measure(o.parts, 0, memory)) for o in rule.options]
            self._measured[key] = (_mean(inner, rule.entropy), memory)  # memory is kept, so that ids stay taken
        return self._measured[key][0]

    def _measure(self, parts: tuple, start: int, memory: dict[str, tuple]) -> Measure:
        nats, size = 0.0, 0.0
        for index in range(start, len(parts)):
            part = parts[index]
            if isinstance(part, str):
                size += len(part.encode())
                continue
            if isinstance(part, Arithmetic):
                pairs = [(p * q, part.text(a, b)) for p, a in memory[part.left] for q, b in memory[part.right]]
                size += math.fsum(p * len(text) for p, text in pairs)
                continue
            if isinstance(part, Choice):
                rule = self.rules[part.rule]
                found = self._measure_rule(rule, memory)
                if part.bind:
                    memory = {**memory, part.bind: self._beliefs(rule)}
            elif isinstance(part, Recall):
                found = self._measure_recall(part, memory)
            else:  # given what var is, the rule is known, and so is what the bound variable may be
                cases = []
                for p, option in memory[part.var]:
                    rule = self.rules[option.columns[part.column][0]]
                    given = {**memory, part.var: self._certain(option)}
                    case = self._measure_rule(rule, given)
                    if part.bind:
                        rest = self._measure(parts, index + 1, {**given, part.bind: self._beliefs(rule)})
                        case = Measure(case.nats + rest.nats, case.size_bytes + rest.size_bytes)
                    cases.append((p, case))
                found = _mean(cases)
                if part.bind:
                    return Measure(nats + found.nats, size + found.size_bytes)
            nats, size = nats + found.nats, size + found.size_bytes
        return Measure(nats, size)

    def _measure_recall(self, part: Recall, memory: dict[str, tuple]) -> Measure:
        if part.column:
            cases = [(p, self._measure(o.columns[part.column], 0, memory)) for p, o in memory[part.var]]
            if any(case.nats for _, case in cases):
                raise GrammarError(f"column {part.column} of {part.var} makes a choice; it may only recall")
        else:  # writing the text again chooses nothing, but takes as many bytes as the first time
            cases = [(p, self._measure(o.parts, 0, memory)) for p, o in memory[part.var]]
        return Measure(0.0, _mean(cases).size_bytes)

    @cache  # noqa: B019 - the object lives as long as the program
    def _beliefs(self, rule: Rule) -> tuple:
        return tuple((rule.probability(option), option) for option in rule.options)

    @cache  # noqa: B019
    def _certain(self, option: Option) -> tuple:
        return ((1.0, option),)

    # Reading ---------------------------------------------------------------------------------------------

    def derivations(self, parts: tuple, text: str) -> Iterator[tuple[float, tuple]]:
        """All ways in which `parts` can write `text`, or a longer text that begins with `text`.

        Yields the log-probability of each and its choices as (rule, option number) pairs. The probabilities
        add up to that of a text with this beginning, whatever follows.
        """
        # A state: place in the text; what is still to be read, as a linked list of (parts, index, memory, rest);
        # log-probability; choices so far, as a linked list.
        agenda: list = [(0, (parts, 0, {}, None), 0.0, None)]
        while agenda:
            place, todo, log_p, choices = agenda.pop()
            while todo is not None and todo[1] == len(todo[0]):
                todo = todo[3]
            if place == len(text):
                yield log_p, _unlink(choices)
                continue
            if todo is None:
                continue
            parts, index, memory, rest = todo
            part = parts[index]
            if isinstance(part, (str, Recall, Arithmetic)):
                wanted = self._fixed(part, memory)
                if text.startswith(wanted[: len(text) - place], place):
                    after = (parts, index + 1, memory, rest)
                    agenda.append((min(place + len(wanted), len(text)), after, log_p, choices))
                continue
            if isinstance(part, _Bind):  # the end of a bound text: what follows it remembers it
                parts, index, memory, rest = rest
                memory = {**memory, part.var: part.option, _written(part.var): text[part.start : place]}
                agenda.append((place, (parts, index, memory, rest), log_p, choices))
                continue
            rule = self.rules[part.rule if isinstance(part, Choice) else memory[part.var].columns[part.column][0]]
            after = (parts, index + 1, memory, rest)
            for number, option in enumerate(rule.options):
                first = option.parts[0]
                if isinstance(first, str) and not text.startswith(first[: len(text) - place], place):
                    continue
                bind = (_Bind(part.bind, option, place),) if part.bind else ()
                p = math.log(rule.probability(option))
                inside = ((*option.parts, *bind), 0, memory, after)
                agenda.append((place, inside, log_p + p, (choices, (rule.name, number))))

    def _fixed(self, part: Any, memory: Memory) -> str:
        """The text of a part that makes no choice."""
        if isinstance(part, str):
            return part
        if isinstance(part, Arithmetic):
            return part.text(memory[part.left], memory[part.right])
        if not part.column:
            return memory[_written(part.var)]
        return "".join(self._fixed(inner, memory) for inner in memory[part.var].columns[part.column])

    # Proving -------------------------------------------------------------------------------------------------

    def conflicts(self) -> list[str]:
        """Pairs of options of one rule of which one can write the beginning of a text of the other; hopefully none.

        Without such pairs each rule is a prefix code. Then reading from left to right never offers two ways:
        recalled texts are fixed by what was read, and at a choice at most one option fits what follows. So no
        text has two derivations. The search takes a recalled text for any text that the variable may ever
        stand for; that may report too much but cannot miss anything.
        """
        found = []
        for rule in self.rules.values():
            for i, one in enumerate(rule.options):
                found += [f"{one.key} / {two.key}" for two in rule.options[:i] if self._meet(one, two)]
        return found

    def _meet(self, one: Option, two: Option) -> bool:
        """True if some text of `one` is the beginning of some text of `two`, or the other way round.

        A side is what is left to be written: a tuple of parts, nearest first. Where both sides go on with the
        same part, it is dropped from both: a choice, because its rule is a prefix code (else the rule itself
        is reported); something recalled, because it was the same when the options were chosen, unless they
        bind it themselves.
        """
        agenda: list[tuple[tuple, tuple, frozenset]] = [(one.parts, two.parts, frozenset())]
        seen: set[tuple[tuple, tuple, frozenset]] = set()
        while agenda:
            pair = agenda.pop()
            if pair in seen:
                continue
            seen.add(pair)
            left, right, own = pair
            if not left or not right:
                return True
            a, b = left[0], right[0]
            if a == b and (isinstance(a, (str, Choice)) or not own.intersection(_recalls(a))):
                agenda.append((left[1:], right[1:], own.union(_binds(a))))
            elif isinstance(a, str) and isinstance(b, str):
                size = min(len(a), len(b))
                if a[:size] == b[:size]:
                    left, right = ((s[0][size:], *s[1:]) if s[0][size:] else s[1:] for s in (left, right))
                    agenda.append((left, right, own))
            else:
                agenda.extend(self._expansions(left, right, own))
        return False

    def _expansions(self, left: tuple, right: tuple, own: frozenset) -> Iterator[tuple]:
        """The pairs that follow when the first part of one side, not a str, is replaced by what it stands for."""
        if isinstance(left[0], str):
            left, right = right, left
        after = right[0][0] if isinstance(right[0], str) else None
        for parts in self._possible(left[0]):
            if after is None or not isinstance(parts[0], str) or parts[0][0] == after:
                binds = frozenset().union(*(_binds(part) for part in parts))
                yield parts + left[1:], right, own.union(_binds(left[0]), binds)

    @cache  # noqa: B019
    def _possible(self, part: Any) -> tuple[tuple, ...]:
        """All rows of parts that `part`, which is not a str, may stand for."""
        if isinstance(part, Choice):
            return tuple(option.parts for option in self.rules[part.rule].options)
        if isinstance(part, Arithmetic):
            left = [option for option in self._bound[part.left] if option.value is not None]
            right = [option for option in self._bound[part.right] if option.value is not None]
            return tuple((text,) for text in sorted({part.text(a, b) for a in left for b in right}))
        options = self._bound[part.var]
        if isinstance(part, Recall) and not part.column:
            return tuple({option.parts for option in options})
        columns = {option.columns[part.column] for option in options if part.column in option.columns}
        if isinstance(part, Recall):
            return tuple(columns)
        return tuple(option.parts for (rule,) in columns for option in self.rules[rule].options)

    @cached_property
    def _bound(self) -> dict[str, set[Option]]:
        """All options that each variable may remember, anywhere."""
        bound: dict[str, set[Option]] = defaultdict(set)
        options = [option for rule in self.rules.values() for option in rule.options]
        size = -1
        while size != sum(map(len, bound.values())):  # a dispatch on a variable may bind another: until no more comes
            size = sum(map(len, bound.values()))
            for part in (part for option in options for part in option.parts if getattr(part, "bind", None)):
                names = (
                    {part.rule}
                    if isinstance(part, Choice)
                    else {o.columns[part.column][0] for o in bound[part.var] if part.column in o.columns}
                )
                for name in names:
                    bound[part.bind].update(self.rules[name].options)
        return bound


def _binds(part: Any) -> tuple[str, ...]:
    """The variable that a part binds, if any."""
    bind = getattr(part, "bind", None)
    return (bind,) if bind else ()


def _recalls(part: Any) -> tuple[str, ...]:
    """The variables that a part reads."""
    return (part.left, part.right) if isinstance(part, Arithmetic) else (part.var,)


class _Bind(NamedTuple):
    """Stands in `derivations` after the parts of an option that is to be remembered."""

    var: str
    option: Option
    start: int


def _mean(cases: list[tuple[float, Measure]], nats: float = 0.0) -> Measure:
    return Measure(nats + math.fsum(p * m.nats for p, m in cases), math.fsum(p * m.size_bytes for p, m in cases))


def _unlink(choices: Any) -> tuple:
    flat = []
    while choices is not None:
        choices, choice = choices
        flat.append(choice)
    return tuple(reversed(flat))
