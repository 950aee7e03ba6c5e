"""`python -m evolve.cli` is `evolve`."""

from evolve.cli import main

if __name__ == "__main__":
    main()
