"""`python -m mone_edge.demo`: build the demo checkpoint and print its folder."""

import argparse
import sys

from mone_edge.demo import model_dir
from mone_edge.errors import MoneEdgeError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mone_edge.demo", description=__doc__)
    parser.add_argument("--offline", action="store_true", help="fetch nothing")
    try:
        sys.stdout.write(f"{model_dir(offline=parser.parse_args().offline)}\n")
    except MoneEdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
