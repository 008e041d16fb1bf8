"""The parts of ``python -m fer.bench``: what is measured, each against a baseline in the same run.

A part is a module here with ``measure(bench: Bench) -> list[Row]`` and a node of the same name in ``conf/bench.yaml``,
which holds its options. It puts its variants into `fer.benching.windows.interleave` and makes a row of each comparison
with `fer.benching.windows.compare`. The text above its table on ``docs/speed.md`` is ``docs/results/speed/<part>.md``.
"""
