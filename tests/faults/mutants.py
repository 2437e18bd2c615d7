"""Faults of our own code that the harness must catch: each undoes one precaution.

A name here is an argument of the harness' commands. The function changes the program in this
process.
"""

from collections.abc import Callable

MUTANTS: dict[str, Callable[[], None]] = {}
