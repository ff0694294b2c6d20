"""`python -m dynmoe`: the commands; see `dynmoe.commands`."""

from dynmoe.commands import main

if __name__ == "__main__":
    main()
