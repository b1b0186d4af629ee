"""`python -m encdec_cli` is `encdec`."""

from encdec_cli.cli import main

if __name__ == "__main__":
    main()
