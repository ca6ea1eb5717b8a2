"""`python -m samq.cli`."""

from samq.cli.app import main

if __name__ == "__main__":
    main()
