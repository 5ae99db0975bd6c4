"""Measure the property index: size, build rate, and queries at scale.

    python -m bench index [--quick]

Every rate is CPU time of one core with warm files. It is the median of some rounds in which ours and what it is
compared with take turns, because the machine may be shared. `--quick` takes a tenth of the rows. Reading is measured by
`python -m bench text` and `python -m bench peers`. Writes bench/out/index.json.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict

from bench._corpus import make_rows
from bench._figures import FigureLine, at_most, print_header, print_line
from bench._format_digests import NUM_SEQUENCES, digests
from bench._index_builds import build_lines, rank_lines
from bench._index_queries import number_lines, query_lines
from bench._results import write_results


def main() -> None:
    """Measure, print and write all figures."""
    quick = "--quick" in sys.argv
    lines: list[FigureLine] = []
    print_header()
    for line in _measure(quick):
        lines.append(line)
        print_line(line)
    write_results("index", {"quick": quick, "lines": [asdict(line) for line in lines]})


def _measure(quick: bool) -> Iterator[FigureLine]:
    num_rows = 100_000 if quick else 1_000_000
    yield from query_lines(1_000_000 if quick else 4_000_000)
    yield from number_lines(1_000_000 if quick else 10_000_000)
    yield from build_lines(make_rows(num_rows), num_rows)
    yield from rank_lines(make_rows(num_rows))
    yield _format_line()


def _format_line() -> FigureLine:
    """Count the different streams that one collection gives in all formats."""
    digest_of_format = digests()
    what = f"different streams of {NUM_SEQUENCES} sequences, {len(digest_of_format)} formats"
    return at_most(what, len(set(digest_of_format.values())), "", "goal", 1)


if __name__ == "__main__":
    main()
