"""``python -m clipseed``."""

from clipseed.cli.main import run

if __name__ == "__main__":
    run()
