"""`python -m qlora_nb`: the command line where the command `qlora_nb` isn't on the PATH."""

from .cli import main

if __name__ == "__main__":
    main()
