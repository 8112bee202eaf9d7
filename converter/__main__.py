"""`python -m converter` is the command `nmsparse`."""

from converter.cli import main

main()
