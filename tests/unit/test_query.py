"""The query language: accepted expressions, refused expressions, and their messages."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.core.query.parse import parse_predicate
from mixtera_hpc.core.query.predicate import Entries
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.testing.fabricated_tables import Sample, make_index_tables

PROPERTIES = {
    "quality": Property(name="quality", kind=Kind.NUMBER),
    "language": Property(name="language", kind=Kind.CATEGORY, values=("2020", "de", "en", "true")),
    "tags": Property(name="tags", kind=Kind.CATEGORIES, values=("python", "spam")),
}


def matching_samples(text: str | None) -> list[int]:
    """Return the positions of the samples that match, out of five."""

    def sample(language: str | None, tags: list[str], quality: float | None) -> Sample:
        known = frozenset([language] if language else [])
        return Sample(categories={"language": known, "tags": frozenset(tags)}, numbers={"quality": quality})

    block = [
        sample("en", ["python"], 0.9),
        sample("de", ["spam", "python"], 0.1),
        sample(None, [], None),
        sample("2020", ["spam"], 0.5),
        sample("true", [], 0.5),
    ]
    tables, read = make_index_tables([block], {n: p.kind for n, p in PROPERTIES.items()})
    columns = read(0)
    entries = Entries.of_samples(tables.combos, columns.combo, columns.numbers)
    return np.flatnonzero(parse_predicate(text, tables.properties).evaluate(entries).must_match).tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("  ", [0, 1, 2, 3, 4]),
        ("language == 'en'", [0]),
        ("'en' == language", [0]),
        ("language != 'en'", [1, 2, 3, 4]),
        ("language in ['en', 'de']", [0, 1]),
        ("language not in ('en', 'de')", [2, 3, 4]),
        ("language in ['en', None]", [0, 2]),
        ("language == None", [2]),
        ("language is not None", [0, 1, 3, 4]),
        ("language == 2020", [3]),
        ("language == True", [4]),
        ("'python' in tags", [0, 1]),
        ("'python' not in tags", [2, 3, 4]),
        ("None in tags", [2, 4]),
        ("tags is None", [2, 4]),
        ("quality >= 0.5", [0, 3, 4]),
        ("0.1 < quality <= 0.5", [3, 4]),
        ("not quality >= 0.5", [1, 2]),
        ("quality is None", [2]),
        ("quality in [0.1, None]", [1, 2]),
        ("quality > -1", [0, 1, 3, 4]),
        ("quality < 1" + "0" * 400, [0, 1, 3, 4]),
        ("quality > -1" + "0" * 400, [0, 1, 3, 4]),
        ("language == 'en' or 'spam' in tags and quality > 0.2", [0, 3]),
        ("language == 'en'\n  or language == 'de'\n", [0, 1]),
        ("language in []", []),
        ("matches(language, 'en|de')", [0, 1]),
        ("not matches(language, 'en|de')", [2, 3, 4]),
        ("matches(language, '[a-z]+') and quality > 0.2", [0, 4]),
        ("matches(language, r'\\d{4}')", [3]),
        ("matches(language, '(?i)EN')", [0]),
        ("matches(tags, 'py.*') or matches(language, 'tr.e')", [0, 1, 4]),
    ],
)
def test_an_expression_selects_the_matching_samples(text: str | None, expected: list[int]) -> None:
    assert matching_samples(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("langauge == 'en'", r"'langauge', which is not a property of the index\. Did you mean 'language'\?"),
        ("language == 'eng'", r"no sample has language = 'eng'\. Did you mean 'en'"),
        ("'pyhton' in tags", r"no sample has tags = 'pyhton'\. Did you mean 'python'\?"),
        ("tags == 'spam'", r"several values per sample; write 'spam' in tags"),
        ("tags in ['spam']", r"several values per sample; write 'spam' in tags"),
        ("'en' in language", r"has one value per sample; write language == 'en'"),
        ("['a', 'b'] in tags", r"\['a', 'b'\] is a list where one value"),
        ("language < 'en'", r"category, which has no order"),
        ("quality == 'high'", r"number and cannot be compared with 'high'"),
        ("quality > None", r"can only be == or != None"),
        ("quality == True", r"cannot be compared with True"),
        ("quality is 3", r"write quality == 3"),
        ("language == no", r"'no' stands where a value is expected\. Put text in quotes: 'no'\."),
        ("language in [en, no]", r"'en' stands where a value is expected"),
        ("quality >", r"does not parse"),
        ("quality = 3", r"does not parse"),
        ("x\0", r"does not parse"),
        ("not " * 5000 + "True", r"does not parse"),
        ("(" * 5000 + "True" + ")" * 5000, r"does not parse"),
        ("quality", r"'quality' is not part of the query language"),
        ("__import__('os').system('true')", r"is not part of the query language"),
        ("quality > (lambda: 1)()", r"is not part of the query language"),
        ("quality.real > 1", r"is not part of the query language"),
        ("quality > 1 + 1", r"'1 \+ 1' is not part of the query language"),
        ("[q for q in tags]", r"is not part of the query language"),
        ("1", r"'1' is not part of the query language"),
        ("'e' in language", r"matches\(language, '\.\*e\.\*'\)"),
        ("3 in quality", r"is a number; write quality == 3"),
        ("match(language, 'en')", r"the only function is matches\. Did you mean 'matches'\?"),
        ("matches(language)", r"write matches\(language, 'en\|de'\)"),
        ("matches('en', language)", r"write matches\(language, 'en\|de'\)"),
        ("matches(language, pattern='en')", r"is not part of the query language"),
        ("matches(langauge, 'en')", r"Did you mean 'language'\?"),
        ("matches(quality, '0.*')", r"is a number, which has no pattern"),
        ("matches(language, 'e')", r"no value of 'language' matches 'e' as a whole"),
        ("matches(language, 'e(')", r"'e\(' is not a valid regular expression"),
    ],
)
def test_an_invalid_expression_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_predicate(text, PROPERTIES)


def test_a_predicate_names_only_the_numbers_that_it_compares() -> None:
    assert parse_predicate("quality > 1 or language == 'en'", PROPERTIES).numbers == {"quality"}
    assert parse_predicate("language == 'en'", PROPERTIES).numbers == frozenset()


def test_a_predicate_can_be_evaluated_without_combos() -> None:
    combos = ComboTable(num_combos=0, properties={}, indptr={}, codes={})
    entries = Entries.of_samples(combos, np.zeros(0, np.int32), {})
    assert parse_predicate("True", {}).evaluate(entries).must_match.tolist() == []


class Garbage:
    """An object that only the garbage collector frees, and whose finaliser gives other threads a chance to run."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        sum(range(50))


@pytest.fixture
def frequent_thread_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.slow
@pytest.mark.usefixtures("frequent_thread_switches")
def test_threads_can_parse_at_the_same_time() -> None:
    text = " and ".join(f"(unknown{i} in ['x', 'y'])" for i in range(60))

    def refused(_: int) -> bool:
        Garbage()
        with pytest.raises(ConfigError):  # Refused at the first name, so that most of the time is spent in ast.parse.
            parse_predicate(text, PROPERTIES)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(refused, range(1500)))
