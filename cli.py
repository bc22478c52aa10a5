"""`python cli.py ...` from a checkout; the installed command is `mone-edge`."""

from mone_edge.cli import main

if __name__ == "__main__":
    main()
