"""The parts of ``python -m fer.bench``: what is measured, each against a baseline in the same run.

A part is a module here with ``measure(bench: Bench) -> list[Row]`` and a node of the same name in ``conf/bench.yaml``,
which holds its options. It puts its variants into `fer.benching.windows.interleave` and makes a row of each comparison
with `fer.benching.windows.compare`. Its table on ``docs/speed.md`` stands between ``<!-- speed <part> -->`` and
``<!-- end -->`` and is written by ``python -m fer.reporting.manual``.
"""
