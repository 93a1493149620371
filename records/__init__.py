"""Series of runs: one folder a series, one ledger line a launch, a generated README and verdict.

`python -m records.series` starts or continues a series (`./run.sh --repeats N` calls it);
`python -m records.report` writes a series' record.json, README.md and losses.png anew from its logs.
"""
