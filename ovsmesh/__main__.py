"""`python -m ovsmesh`: the same as the console script. Knows only where the command line is."""

from ovsmesh.cli.main import main

if __name__ == "__main__":
    main()
