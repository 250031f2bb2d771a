"""``python -m zeropoint``: the command."""

from zeropoint.cli import main

if __name__ == "__main__":
    main()
