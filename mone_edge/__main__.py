"""`python -m mone_edge ...`, the same as `mone-edge ...`."""

from mone_edge.cli import main

if __name__ == "__main__":
    main()
