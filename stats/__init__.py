"""From the logs of training runs to verdicts that hold.

    python -m stats.ttest records/                 is the mean loss below the threshold?
    python -m stats VERB --help                    ttest, compare, plan, monitor, validate, curve, times, ...

Every verb is a pure function with a frozen dataclass as its result, and can be used without the command line:

    from stats.runs import read_runs               logs of any dialect -> Run
    from stats.ttest import ttest                  losses -> TTest
    from stats.compare import compare              two samples -> Comparison
    from stats.plans import make_plan, read_plan   design of a series -> Plan
    from stats.sequential import decide            losses so far + Plan -> CONTINUE, ACCEPT or FUTILE
    from stats.validate import validate            a record's folder -> grade A to F with its reasons

Importing this package imports nothing else; each module loads what it needs. README.md beside this file
documents the dialects that are read, the JSON that is printed and what each test assumes.
"""
