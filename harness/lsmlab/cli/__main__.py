"""`python -m lsmlab.cli`."""

from lsmlab.cli import main

main()
