"""The script `polygrad-fast`, and `python -m polygrad_fast`."""

import sys


def main() -> int:
    """Run the command line; nothing is imported before an interrupt is answered in a sentence."""
    try:
        from polygrad_fast import cli

        return cli.main()
    except KeyboardInterrupt:
        print("polygrad-fast: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
