"""The verbs of the command line, a file for each kind of question; `stats.cli` gathers them.

Only argparse is imported at the top of these files: a verb loads what it needs when it runs.
"""
