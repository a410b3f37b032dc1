"""``python -m pycdgkd`` is the command ``pycdgkd``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
